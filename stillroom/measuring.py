"""Body of `stillroom losses`: what selections are made from, where a model must be asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from stillroom.console import Reporter, show_pairs
from stillroom.storage.depot import path_or_url

if TYPE_CHECKING:
    from stillroom.train.measure import Measured


class LossesConfig(BaseModel):
    """Settings of `stillroom losses`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    cache: Annotated[Path | str, BeforeValidator(path_or_url)] = Field(description="directory or URL of the cache")
    model: str = Field(description="folder or hub id of the model: a reference model, or the student to be")
    out: Path | None = Field(None, description="file of the losses (unset: in derived/ of the cache)")
    sample: int | None = Field(None, ge=1, description="measure so many sequences, evenly spread (unset: all)")
    batch_size: int = Field(8, ge=1, description="sequences per forward")
    cache_dir: Path | None = Field(None, description="directory of the local copies of a remote cache")
    cache_bytes: int | None = Field(None, ge=1, description="the most bytes of shards kept there")


def losses(config: LossesConfig, as_json: bool) -> Measured:
    """`stillroom losses`."""
    from stillroom.train.measure import measure_losses

    with Reporter() as report:
        result = measure_losses(
            config.cache,
            config.model,
            out=config.out,
            sample=config.sample,
            batch_size=config.batch_size,
            cache_dir=config.cache_dir,
            cache_bytes=config.cache_bytes,
            on_progress=lambda done, total: report("losses", done, total),
        )
    if not as_json:
        pairs = [
            ("model", result.model),
            ("sequences", f"{result.measured:,} of {result.sequences:,} ({result.new:,} measured now)"),
            ("mean loss", f"{result.loss:.4f} nats a row"),
            ("seconds", f"{result.seconds:.1f}"),
        ]
        show_pairs(f"losses {result.out}", pairs)
    return result
