"""What killed writers leave: attempts that no record names, temporary files. Collected when they are old."""

from __future__ import annotations

import re
from typing import Final

from stillroom.storage.commits import COMMITS, SHARDS, find_record, shards_named
from stillroom.storage.depot import Depot
from stillroom.storage.manifest import Manifest

ORPHAN_AGE_S: Final = 86400.0
_ATTEMPT: Final = re.compile(r"(\d{6,12})-[0-9a-f]{8,32}\.zarr")


def collect_orphans(depot: Depot, manifest: Manifest, age_s: float = ORPHAN_AGE_S) -> list[str]:
    """Delete attempts and temporary files that no record names and that nobody touched for `age_s` seconds.

    The age keeps a living writer's attempt safe. The cost is two listings: records are read only of shards with several
    attempts, ages only of what no record names.

    Returns:
        their paths, relative to the cache.
    """
    attempts: dict[int, list[str]] = {}
    for name in depot.names(SHARDS):
        if match := _ATTEMPT.fullmatch(name):
            attempts.setdefault(int(match[1]), []).append(f"{SHARDS}/{name}")
    done = shards_named(depot.names(COMMITS))  # after the attempts: what was committed meanwhile is seen
    suspects = depot.leavings()
    for index, paths in attempts.items():
        if index in done and len(paths) == 1:
            continue  # the one its record names
        record = find_record(depot, manifest, index) if index < manifest.shards else None
        suspects += [path for path in paths if record is None or path != record.path]
    orphans = [path for path in suspects if depot.age_s(path) > age_s]
    for path in orphans:
        depot.discard(path)
    return orphans
