"""Ways to start "these shards, here" (`pipeline.run.run_shards`) on more than one core, GPU or machine.

    ranks   this process alone, or its stripe of the shards where torchrun, SLURM or a Kubernetes Indexed Job started several
    local   processes of this machine, started again when they die
    ray     tasks on a Ray cluster

All give the same bytes. None needs the others alive: what they share is the commit records.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stillroom.pipeline.config import CacheConfig
from stillroom.pipeline.engines.here import run_place, sequences_of, settle_index, use_device_of_rank
from stillroom.pipeline.engines.joined import check_engine, joined
from stillroom.pipeline.engines.ranks import Place, place
from stillroom.pipeline.engines.stop import Stop
from stillroom.pipeline.prepare import Progress, prepare
from stillroom.pipeline.run import CacheResult, RunStats
from stillroom.storage.depot import Depot, depot_at
from stillroom.storage.errors import InputError
from stillroom.storage.index import read_index
from stillroom.storage.manifest import MANIFEST_NAME, Manifest
from stillroom.storage.writer import CacheWriter

if TYPE_CHECKING:
    from stillroom.pipeline.group import Group

LIST_EVERY_S: Final = 2.0
logger = logging.getLogger(__name__)


def build(config: CacheConfig, on_progress: Progress, stop: Stop) -> CacheResult:
    """Write the cache `config` describes, or what is missing of it, the way `config.engine` says.

    Args:
        config: of the run.
        on_progress: told (stage, done, total): stage `pack` counts documents (total 0: unknown), `cache` sequences.
        stop: whether to go on.

    Raises:
        InputError, PlanMismatchError, CacheError, OSError: as `build_cache`.
        Terminated: SIGTERM came.
    """
    check_engine(config)
    at, start_s = place(config), time.perf_counter()
    if config.engine == "ranks":
        if config.workers is not None:
            raise InputError(
                "--workers is for --engine local or ray: name one of them, or start this command several times"
            )
        with joined(config, at) as (at, group):
            return _build_rank(config, at, on_progress, stop, group)
    if config.engine == "local":
        from stillroom.pipeline.engines.local import run_local

        local = run_local(config, at, on_progress)
        before, stats = local.before, [RunStats(**{**told, "notes": tuple(told["notes"])}) for told in local.stats]
    else:
        from stillroom.pipeline.engines.on_ray import run_ray

        if config.rank is not None:
            raise InputError("--rank and --ranks came with --engine ray, which deals the shards itself: drop them")
        before, stats = run_ray(config, on_progress)
    depot = depot_at(config.out)
    manifest = Manifest.from_json(depot.read_json(MANIFEST_NAME))
    if before < manifest.shards:
        settle_index(depot, manifest)
    return _result(depot, manifest, before, time.perf_counter() - start_s, stats)


def _build_rank(config: CacheConfig, at: Place, on_progress: Progress, stop: Stop, group: Group | None) -> CacheResult:
    if at.ranks > 1:
        use_device_of_rank()
        if at.rank:
            on_progress = _silent  # one of them speaks, for all
    prepared = prepare(config, on_progress, group)
    writer, manifest = prepared.writer(), prepared.manifest
    before, start_s, stats = len(writer.committed()), time.perf_counter(), RunStats()
    if at.rank >= manifest.shards:
        logger.warning(
            "worker %d of %d has nothing to do: the plan has %d shards, so take that many workers at most",
            at.rank, at.ranks, manifest.shards,
        )  # fmt: skip
    elif before < manifest.shards:
        if at.ranks > 1 and not at.rank:
            on_progress = _of_all(writer, on_progress)
        stats, last = run_place(prepared, at, stop, on_progress)
        if last:
            settle_index(writer.depot, manifest)
    elif isinstance(writer.root, Path) and not at.rank and read_index(writer.root, manifest) is None:
        settle_index(writer.depot, manifest)  # whoever came last was killed before it could
    return _result(writer.depot, manifest, before, time.perf_counter() - start_s, [stats])


def _result(depot: Depot, manifest: Manifest, before: int, seconds: float, stats: list[RunStats]) -> CacheResult:
    return CacheResult(
        out=depot.root,
        sequences=manifest.sequences,
        rows=manifest.sequences * manifest.packing.seq_len,
        shards=manifest.shards,
        shards_before=before,
        seconds=seconds,
        stats=RunStats.together(stats),
    )


def _silent(stage: str, done: int, total: int) -> None:
    pass


def _of_all(writer: CacheWriter, on_progress: Progress) -> Progress:
    """Progress of all workers, from the commit records, where each knows only its own."""
    asked_s = -LIST_EVERY_S

    def tell(stage: str, done: int, total: int) -> None:
        nonlocal asked_s
        if time.monotonic() - asked_s >= LIST_EVERY_S:
            asked_s = time.monotonic()
            on_progress(stage, sequences_of(writer.manifest, writer.committed()), writer.manifest.sequences)

    return tell
