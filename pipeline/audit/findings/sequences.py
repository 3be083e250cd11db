"""Are all sequences there, once each, in order: their tokens against one another, over the cache or a large part of it.

Shapes: `S` sequences scanned, `L1` tokens of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from stillroom.pipeline.audit.findings.test import Test, certain
from stillroom.storage.cache import Cache
from stillroom.storage.errors import DamagedError
from stillroom.storage.layout import TOP_KINDS
from stillroom.storage.manifest import CONCAT, DOCUMENTS

BLOCK: Final = 256
SHOWN: Final = 20


@dataclass(frozen=True, slots=True)
class Scan:
    """What the tokens say.

    Attributes:
        sequences: scanned. repeated: sequences whose tokens another has too. copies: pairs of sequences with the same tokens
            and the very same draws, the first few. copied: how many there are.
        broken: sequence numbers that do not begin with the last token of the one before.
        unigram_V: counts of token ids.
        damaged: shards that can not be read, and why.
    """

    sequences: int
    repeated: int
    copied: int
    copies: list[tuple[int, int]]
    broken: list[int]
    unigram_V: np.ndarray[tuple[int], np.dtype[np.int64]]
    damaged: dict[int, str]


def scan(
    cache: Cache, limit: int, seed: int, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Scan:
    """Read the tokens of whole shards, all of them or a random part of about `limit` sequences."""
    manifest = cache.manifest
    width = max(manifest.vocab_size, manifest.tokenizer.vocab_size)
    unigram_V = np.zeros(width, np.int64)
    firsts = dict(zip(cache.shards, np.cumsum([0, *cache.lengths]).tolist()))
    order = [cache.shards[at] for at in np.random.default_rng(seed).permutation(len(cache.shards))]
    seen: dict[bytes, int] = {}
    repeated, copied, sequences = 0, 0, 0
    copies: list[tuple[int, int]] = []
    broken: list[int] = []
    damaged: dict[int, str] = {}
    ends: dict[int, tuple[int, int]] = {}
    for done, shard in enumerate(order):
        start, stop = manifest.shard_range(shard)
        if sequences and sequences + stop - start > limit:
            break
        last, pairs = -1, []
        try:
            for begin in range(0, stop - start, BLOCK):
                tokens_BL1 = cache.row_codes(shard, begin, min(begin + BLOCK, stop - start), ("tokens",))["tokens"]
                if tokens_BL1.max() >= width:
                    raise DamagedError(f"shard {shard} has a token id that is not below {width}")
                unigram_V += np.bincount(tokens_BL1.ravel(), minlength=width)
                for offset, tokens_L1 in enumerate(tokens_BL1):
                    number = start + begin + offset
                    key = hashlib.blake2b(tokens_L1.tobytes(), digest_size=16).digest()
                    if key in seen:
                        pairs.append((seen[key], firsts[shard] + begin + offset))
                    else:
                        seen[key] = firsts[shard] + begin + offset
                    if number == start:
                        ends[shard] = (int(tokens_L1[0]), 0)
                    elif last != int(tokens_L1[0]):
                        broken.append(number)
                    last = int(tokens_L1[-1])
            ends[shard] = (ends[shard][0], last)
            repeated += len(pairs)
            for one, other in pairs:
                if _same(cache, one, other):
                    copied += 1
                    if len(copies) < SHOWN:
                        copies.append((cache.sequence_number(one), cache.sequence_number(other)))
        except DamagedError as error:
            damaged[shard] = error.what or str(error)
            ends.pop(shard, None)
        sequences += stop - start
        on_progress(done + 1, len(order))
    if manifest.packing.policy not in (CONCAT, DOCUMENTS):
        broken = []
    else:
        broken += [
            manifest.shard_range(shard)[0]
            for shard in ends
            if shard - 1 in ends and ends[shard - 1][1] != ends[shard][0]
        ]
    return Scan(sequences, repeated, copied, copies, sorted(broken), unigram_V, damaged)


def _same(cache: Cache, one: int, other: int) -> bool:
    """Whether two sequences hold the very same draws. Samplers that do not draw say nothing by it."""
    if cache.manifest.sampler.kind in TOP_KINDS:
        return False
    left, right = cache[one].targets, cache[other].targets
    return (
        left.entries > 0
        and np.array_equal(left.offsets, right.offsets)
        and np.array_equal(left.ids, right.ids)
        and np.array_equal(left.weights, right.weights)
    )


def sequences(found: Scan) -> list[Test]:
    """Rules no sound cache breaks."""
    pairs = ", ".join(f"{one} and {other}" for one, other in found.copies[:3])
    return [
        Test(
            name="sequences.copied",
            what="sequences that repeat another's tokens and draws",
            statistic=found.copied,
            p=certain(found.copied),
            says=f"{found.copied:,} sequences are copies of others, draws and all ({pairs})",
            consequence="the text they stand for is missing, or the same random numbers were used twice",
            remedy="a writer ran twice over the same text, or with one key: make the shards of one of each pair again",
            figures={"pairs": found.copies, "repeated_tokens": found.repeated},
        ),
        Test(
            name="sequences.order",
            what="sequences that do not begin with the last token of the one before",
            statistic=len(found.broken),
            p=certain(len(found.broken)),
            says=f"{len(found.broken):,} sequences do not follow the one before (the first is {next(iter(found.broken), None)}): "
            "some are missing, repeated or out of order",
            consequence="text is missing or doubled, and the corpus fingerprint in the manifest is not that of these tokens",
            remedy="`stillroom verify` says which shard is at fault; make it again",
            figures={"sequences": found.broken[:SHOWN]},
        ),
        Test(
            name="record.damaged",
            what="shards that can not be read",
            statistic=len(found.damaged),
            p=certain(len(found.damaged)),
            says=f"{len(found.damaged)} shards are damaged and were left out: "
            + "; ".join(f"{shard}: {what}" for shard, what in sorted(found.damaged.items())[:3]),
            consequence="training stops at them",
            remedy="`stillroom verify --repair`, then `stillroom cache` again: only they are recomputed",
            figures={"shards": {str(shard): what for shard, what in found.damaged.items()}},
        ),
    ]
