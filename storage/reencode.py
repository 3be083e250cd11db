"""A cache in another profile: the same targets to the last bit, shard by shard, resumable."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from stillroom.storage.cache import open_cache
from stillroom.storage.commits import damaged
from stillroom.storage.errors import DamagedError
from stillroom.storage.manifest import Profile
from stillroom.storage.raw import blocks_of, read_block
from stillroom.storage.readers import DirectReader
from stillroom.storage.writer import CacheWriter


def reencode(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    profile: Profile,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the cache `source` to `out` in `profile`. Run again after a stop, it goes on where it was.

    Args:
        source: a complete cache.
        out: another directory.
        profile: of the new cache.
        on_progress: told how many shards are done, of how many.

    Raises:
        CacheError: `source` is incomplete or damaged, or `out` belongs to another run.
        OSError: the disk refused.
    """
    cache = open_cache(Path(source))
    writer = CacheWriter(out, replace(cache.manifest, profile=profile))
    ready = writer.committed()
    for done, shard in enumerate(cache.shards, 1):
        if shard not in ready:
            record, seq_len = cache.record(shard), cache.manifest.packing.seq_len
            reader = DirectReader(cache.path, cache.manifest, record)
            try:
                blocks = [
                    read_block(reader, cache.manifest, start, stop)
                    for start, stop in blocks_of(0, record.sequences, seq_len)
                ]
            except DamagedError as error:
                raise damaged(shard, error.what or str(error)) from error
            writer.write_blocks(shard, blocks)
        on_progress(done, len(cache.shards))
