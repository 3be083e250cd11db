"""Settings of `stillroom audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from stillroom.storage.depot import path_or_url


class AuditConfig(BaseModel):
    """Settings of `stillroom audit`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cache: Annotated[Path | str, BeforeValidator(path_or_url)] = Field(description="directory or URL of the cache")
    teacher: str | None = Field(None, description="folder or hub id of the teacher (unset: the name in the manifest)")
    revision: str | None = Field(None, description="its branch, tag or commit on the hub (unset: the manifest's)")
    no_teacher: bool = Field(False, description="ask the cache alone: no teacher is loaded")
    student: str | None = Field(
        None,
        description="folder or hub id of a student, for the gradient's angle (unset: the teacher at temperature 1.5)",
    )
    rows: int = Field(4096, ge=64, description="rows to recompute, in whole sequences spread over the shards")
    seed: int = Field(0, ge=0, description="which ones, and the audit's own draws")
    out: Path | None = Field(
        None, description="folder of audit.json and of what a killed audit goes on from (unset: none)"
    )
    scan: int = Field(65_536, ge=0, description="sequences whose tokens are compared with one another, at most")
    measures: bool = Field(True, description="measure the cache's worth too, not only test it")
    dtype: Literal["manifest", "float32", "bfloat16", "float16"] = Field(
        "manifest", description="precision of the teacher's body (manifest: as the cache was made)"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the teacher runs")
    batch_size: int = Field(8, ge=1, description="sequences per teacher forward")
    trust_remote_code: bool = Field(False, description="run modelling code that comes with the checkpoint")
    attn_implementation: str | None = Field(None, description="attention of the teacher (as for `stillroom cache`)")
    device_map: str | None = Field(None, description="spread the teacher over the devices of this process")
    adapter: str | None = Field(None, description="folder or hub id of the PEFT adapter the teacher had")
