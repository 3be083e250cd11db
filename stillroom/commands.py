"""Bodies of the commands: each takes its settings, calls one room, prints a summary and returns the result."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from stillroom.console import Reporter, say, show_pairs, show_table

if TYPE_CHECKING:
    from stillroom.demo import DemoResult
    from stillroom.pipeline.config import CacheConfig
    from stillroom.pipeline.run import CacheResult, RunStats
    from stillroom.storage.cache import Cache
    from stillroom.storage.progress import Seen
    from stillroom.train.config import TrainConfig
    from stillroom.train.run import TrainResult


class InspectConfig(BaseModel):
    """Settings of `stillroom inspect`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    cache: str = Field(description="directory or URL of the cache")
    sample: int = Field(64, ge=1, description="sequences read to measure kept mass and entries per row")
    watch: float | None = Field(
        None,
        gt=0,
        description="follow a run instead, on however many machines: shards, rows/s, time left, every so many seconds (alone: 5)",
        json_schema_extra={"alone": 5},
    )


class DemoConfig(BaseModel):
    """Settings of `stillroom demo`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    out: Path = Field(Path("runs/demo"), description="folder for everything the demo makes")
    tokens: int = Field(300_000, ge=20_000, description="tokens the teacher and each student are trained on")
    seed: int = Field(0, description="seed of initial weights, order and sampler")


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `stillroom inspect` reports.

    Attributes:
        complete: whether every shard of the plan is committed.
        sequences, rows, entries: what is committed.
        entries_per_row: mean.
        bytes_per_row: by array, mean over the cache.
        kept_mass: mean teacher probability of the kept ids, or None where the cache keeps no log-probabilities.
        manifest: what made the cache.
    """

    complete: bool
    sequences: int
    rows: int
    entries: int
    entries_per_row: float
    bytes_per_row: dict[str, float]
    kept_mass: float | None
    manifest: dict[str, Any]


def cache(config: CacheConfig, as_json: bool) -> CacheResult:
    """`stillroom cache`."""
    from stillroom.pipeline.engines.stop import Stop
    from stillroom.pipeline.run import build_cache

    with Reporter() as report, Stop() as stop:
        result = build_cache(config, on_progress=report, stop=stop)
    if result.already_done:
        say(f"cache {result.out} is complete ({result.shards} shards): nothing to do")
    if not as_json:
        show_pairs(
            f"cache {result.out}",
            [
                ("sequences", f"{result.sequences:,}"),
                ("rows", f"{result.rows:,}"),
                ("shards", f"{result.shards} ({result.shards_before} were there)"),
                ("seconds", f"{result.seconds:.1f}"),
                *_stage_figures(result.stats),
            ],
        )
        if result.stats.shards:
            _show_stages(result.stats)
    return result


def inspect(config: InspectConfig, as_json: bool) -> Inspection | Seen:
    """`stillroom inspect`."""
    if config.watch is not None:
        from stillroom.watching import watch

        return watch(config.cache, config.watch, as_json)
    from stillroom.storage.cache import open_cache

    opened = open_cache(config.cache, partial=True)
    result = _inspection(opened, config.sample)
    if not as_json:
        made = opened.manifest
        show_pairs(
            f"cache {config.cache}" + ("" if result.complete else " (incomplete)"),
            [
                ("teacher", f"{made.teacher.name} ({made.teacher.fingerprint[:12]}, {made.teacher.dtype})"),
                ("corpus", f"{made.corpus.name} ({made.corpus.documents:,} documents)"),
                ("sampler", f"{made.sampler.kind}, N = {made.sampler.draws}, seed {made.sampler.seed}"),
                ("packing", f"{made.packing.policy}, {made.packing.seq_len} rows a sequence"),
                ("vocabulary", f"{made.vocab_size:,}"),
                ("made", f"{made.created} by stillroom {made.libraries.get('stillroom', '?')}"),
                ("sequences", f"{result.sequences:,} of {made.sequences:,}"),
                ("rows", f"{result.rows:,}"),
                ("entries per row", f"{result.entries_per_row:.2f}"),
                ("kept mass", "not kept" if result.kept_mass is None else f"{result.kept_mass:.4f}"),
            ],
        )
        total = sum(result.bytes_per_row.values())
        rows = [(name, f"{value:.2f}", f"{value / total:.1%}") for name, value in result.bytes_per_row.items()]
        show_table("bytes per row", ("array", "bytes", "share"), [*rows, ("all", f"{total:.2f}", "")])
    return result


def train(config: TrainConfig, as_json: bool) -> TrainResult | None:
    """`stillroom train`; of several processes the first alone has something to say."""
    from stillroom.evaluating import held_out_text
    from stillroom.train.run import train_student
    from stillroom.train.stop import Stop

    with Reporter() as report, Stop() as stop:
        result = train_student(
            config,
            eval_tokens_SL1=held_out_text(config),
            on_progress=lambda done, total, note: report("train", done, total, _note(note)),
            stop=stop,
        )
    if os.environ.get("RANK", "0") != "0":
        return None
    for note in result.notes:
        say(note)
    if result.already_done:
        say(f"run {result.out} is finished ({result.steps} steps): nothing to do")
    if not as_json:
        shown = ("steps", "tokens", "loss", "seconds", "tokens_per_s")
        show_pairs(f"student {result.out}", [(name, _number(getattr(result, name))) for name in shown])
    return result


def demo(config: DemoConfig, as_json: bool) -> DemoResult:
    """`stillroom demo`."""
    from stillroom.demo import run_demo

    with Reporter() as report:
        result = run_demo(config.out, tokens=config.tokens, seed=config.seed, report=report)
    if not as_json:
        result.show()
    return result


def _stage_figures(stats: RunStats) -> list[tuple[str, str]]:
    found = [("most memory, host", f"{stats.peak_host_bytes / 2**20:,.0f} MiB")] if stats.shards else []
    if stats.peak_device_bytes is not None:
        found.append(("most memory, device", f"{stats.peak_device_bytes / 2**20:,.0f} MiB"))
    if stats.taken_up:
        found.append(("sequences taken up from an interrupted run", f"{stats.taken_up:,}"))
    if stats.bad_rows:
        found.append(("bad rows left out", f"{stats.bad_rows:,}"))
    return found + [("note", note) for note in stats.notes]


def _show_stages(stats: RunStats) -> None:
    """Seconds by stage and their share of the time worked; encode and commit run beside the others."""
    total = sum(stats.stages.values())
    rows = [(name, f"{seconds:.2f}", f"{seconds / total:.1%}") for name, seconds in stats.stages.items()]
    show_table("stages", ("stage", "seconds", "share"), rows)


def _inspection(opened: Cache, sample: int) -> Inspection:
    import numpy as np

    rows = len(opened) * opened.manifest.packing.seq_len
    kept: list[float] = []
    for index in (
        np.unique(np.linspace(0, len(opened) - 1, min(sample, len(opened))).astype(int)) if len(opened) else []
    ):
        targets = opened[int(index)].targets
        if targets.logp is None or np.isnan(targets.logp).any():
            break
        kept.append(float(np.exp(targets.logp.astype(np.float64)).sum() / targets.rows))
    return Inspection(
        complete=len(opened) == opened.manifest.sequences,
        sequences=len(opened),
        rows=rows,
        entries=opened.entries,
        entries_per_row=opened.entries / max(rows, 1),
        bytes_per_row={name: size / max(rows, 1) for name, size in opened.bytes_by_array().items()},
        kept_mass=float(np.mean(kept)) if kept else None,
        manifest=opened.manifest.to_json(),
    )


def _note(metrics: dict[str, Any]) -> str:
    return " ".join(f"{name} {_number(value)}" for name, value in metrics.items())


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
