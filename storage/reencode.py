"""A cache in another profile: the same targets to the last bit, shard by shard, resumable."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from stillroom.storage.cache import open_cache
from stillroom.storage.commits import damaged
from stillroom.storage.errors import DamagedError
from stillroom.storage.index import write_index
from stillroom.storage.interchange.tokenizer import copy_tokenizer
from stillroom.storage.manifest import Profile
from stillroom.storage.raw import blocks_of, read_block
from stillroom.storage.readers import DirectReader
from stillroom.storage.writer import CacheWriter


@dataclass(frozen=True, slots=True)
class ReencodeResult:
    """What a re-encoding did.

    Attributes:
        out: directory of the new cache.
        profile: its profile.
        shards: shards of it; `shards_before` of them were there already.
        bytes_per_row, source_bytes_per_row: of the new cache and of the old one.
    """

    out: Path
    profile: Profile
    shards: int
    shards_before: int
    bytes_per_row: float
    source_bytes_per_row: float

    @property
    def already_done(self) -> bool:
        """True when there was nothing left to do."""
        return self.shards_before == self.shards


def reencode(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    profile: Profile,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ReencodeResult:
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
    copy_tokenizer(cache.path, Path(out))
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
    if ready < set(cache.shards):
        write_index(out)
    new, rows = open_cache(Path(out)), len(cache) * cache.manifest.packing.seq_len
    return ReencodeResult(
        out=Path(out),
        profile=profile,
        shards=len(cache.shards),
        shards_before=len(ready),
        bytes_per_row=sum(new.bytes_by_array().values()) / rows,
        source_bytes_per_row=sum(cache.bytes_by_array().values()) / rows,
    )
