"""Which sequences are recomputed: whole ones, seeded, the same places of every shard, so that random numbers that shards share
show, and at least two of every shard where that is not too many.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from stillroom.storage.cache import Cache
from stillroom.storage.errors import DamagedError

LEAST_SEQUENCES: Final = 16  # intervals are over sequences
SHARD_SEQUENCES: Final = 64  # at most so many for the sake of the shards


def wanted(rows: int, seq_len: int, shards: int) -> int:
    """How many sequences an audit of so many rows takes."""
    return max(-(-rows // seq_len), LEAST_SEQUENCES, min(2 * shards, SHARD_SEQUENCES))


def pick(cache: Cache, rows: int, seed: int) -> tuple[list[int], dict[int, str]]:
    """Indices of sequences at hand, ascending, and what is wrong with each shard that can not be read.

    Args:
        cache: open, `partial` where it is not complete.
        rows: at least so many, or all there are.
        seed: of the choice.
    """
    rng = np.random.default_rng(seed)
    lengths = cache.lengths
    firsts = np.cumsum([0, *lengths])
    places = rng.permutation(max(lengths, default=0))
    many = wanted(rows, cache.manifest.packing.seq_len, len(cache.shards))
    chosen: list[int] = []
    damaged: dict[int, str] = {}
    for place in places:
        for at in rng.permutation(len(lengths)):
            shard = cache.shards[at]
            if len(chosen) >= many:
                return sorted(chosen), damaged
            if place < lengths[at] and shard not in damaged:
                index = int(firsts[at] + place)
                try:
                    cache.read([index])
                except DamagedError as error:
                    damaged[shard] = error.what or str(error)
                    chosen = [each for each in chosen if cache.shard_of(each) != shard]
                else:
                    chosen.append(index)
    return sorted(chosen), damaged
