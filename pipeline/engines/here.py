"""These shards, here: one worker's part of a run, whoever started it."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from stillroom.pipeline.engines.ranks import Deal, Place
from stillroom.pipeline.engines.stop import Stop
from stillroom.pipeline.prepare import Prepared, Progress
from stillroom.pipeline.run import RunStats, run_shards
from stillroom.storage.commits import COMMITS, shards_named
from stillroom.storage.depot import Depot
from stillroom.storage.index import write_index
from stillroom.storage.journal import journals_at
from stillroom.storage.manifest import Manifest


def run_place(prepared: Prepared, at: Place, stop: Stop, on_progress: Progress) -> tuple[RunStats, bool]:
    """The shards of the worker at `at`, and near the end those nobody else has made.

    Args:
        prepared: the settled run.
        at: which worker this is.
        stop: whether to go on.
        on_progress: as `run_shards` takes it.

    Returns:
        What was done, and whether the cache's last shard was this worker's: then index.arrow is for it to write.

    Raises:
        Terminated: SIGTERM came; the shard in hand was finished, or left to its journal if it took long.
        InputError, OSError, CacheError: as `run_shards`.
    """
    deal = Deal(prepared.manifest.shards, at, prepared.writer().committed)
    stats = run_shards(prepared, stop.while_wanted(deal), on_progress)
    stop.check()
    return stats, deal.last


def settle_index(depot: Depot, manifest: Manifest) -> None:
    """If every shard is committed: write index.arrow (one file to open instead of a record per shard), and delete what journals
    killed workers left. Any process may."""
    if len(shards_named(depot.names(COMMITS))) >= manifest.shards:
        write_index(depot)
        journals = journals_at(depot, manifest)
        journals.clear(journals.indices())


def sequences_of(manifest: Manifest, shards: Iterable[int]) -> int:
    """How many sequences these shards hold."""
    ranges = (manifest.shard_range(shard) for shard in shards if shard < manifest.shards)
    return sum(stop - start for start, stop in ranges)


def use_device_of_rank() -> None:
    """Let `cuda` mean this worker's own device where several workers of a machine see all of them."""
    number = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
    if number and torch.cuda.is_available() and torch.cuda.device_count() > 1:
        torch.cuda.set_device(int(number) % torch.cuda.device_count())
