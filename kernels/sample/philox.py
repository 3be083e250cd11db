"""Philox4x32-10, the counter-based generator behind every random number of a cache.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A draw is a pure function of
(seed, sequence, row, stream, draw number), so it does not depend on batch size, order, restart or world size.

    key      = the 64-bit seed, low word first
    counter  = (draw pair, row + 2**24 * (sequence mod 2**8), sequence div 2**8, stream)

Rows below 2**24 and sequences below 2**40 fill the two middle words exactly, so no two of them share a counter. One call gives
four 32-bit words, hence two 64-bit draws: words (0, 1) for the even draw of the pair, (2, 3) for the odd one, low word first.

Shapes: `N` rows, `D` draws of a row. 32-bit words travel in int64 tensors; a product of two of them wraps modulo 2**64, which
leaves every bit of it in place.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

MAX_SEQUENCE: Final = 1 << 40
MAX_ROW: Final = 1 << 24
KEYS: Final = {"sequence_N": MAX_SEQUENCE, "row_N": MAX_ROW}  # what is keyed by, and its bound
WORD: Final = 0xFFFFFFFF
STREAM_DRAWS: Final = 0
STREAM_ROUNDING: Final = 1


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four broadcastable int64 tensors of 32-bit words.
        seed: 64-bit key.

    Returns:
        Four int64 tensors of 32-bit words, of the broadcast shape.
    """
    c0, c1, c2, c3 = counter
    key0, key1 = seed & WORD, seed >> 32
    for _ in range(10):
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (odd >> 32).bitwise_and_(WORD) ^ c1 ^ key0, odd.bitwise_and_(WORD)
        c2, c3 = (even >> 32).bitwise_and_(WORD) ^ c3 ^ key1, even.bitwise_and_(WORD)
        key0, key1 = (key0 + 0x9E3779B9) & WORD, (key1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def random_words(seed: int, sequence_N: Tensor, row_N: Tensor, *, stream: int, count: int) -> tuple[Tensor, Tensor]:
    """`count` 64-bit draws per row as (high, low) 32-bit words, each `[N, count]` int64.

    Raises:
        ValueError: seed, sequence, row, stream or count out of range, or rows and sequences of different shapes.
    """
    check_key(seed, stream, count)
    for name, index_N, bound in zip(KEYS, (sequence_N, row_N), KEYS.values()):
        if index_N.dtype != torch.int64 or index_N.dim() != 1 or index_N.shape != row_N.shape:
            raise ValueError(
                f"`{name}` came as {index_N.dtype}{list(index_N.shape)}, wanted int64[N], one for each row: "
                "pass the index of every row's sequence and its position there"
            )
        if index_N.numel():
            check_range(name, int(index_N.min()), int(index_N.max()), bound)
    pair_D = torch.arange((count + 1) // 2, device=row_N.device)
    row_word_N1 = ((sequence_N & 0xFF) << 24 | row_N).unsqueeze(1)
    sequence_word_N1 = (sequence_N >> 8).unsqueeze(1)
    words = philox4x32((pair_D, row_word_N1, sequence_word_N1, torch.full_like(sequence_word_N1, stream)), seed)
    low_ND, high_ND = (torch.stack((words[i], words[i + 2]), 2).flatten(1)[:, :count] for i in (0, 1))
    return high_ND, low_ND


def uniforms(seed: int, sequence_N: Tensor, row_N: Tensor, *, stream: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1), keyed by row: the one source of randomness outside the sampler's own draws.

    Args:
        seed: 64-bit key, 0 to 2**64 - 1.
        sequence_N: `[N]` int64, index of the sequence in the corpus, below 2**40.
        row_N: `[N]` int64, index of the row in its sequence, below 2**24.
        stream: 32-bit tag of an independent stream; 0 is the sampler's draws, 1 the rounding of stored codes.
        count: numbers per row.

    Returns:
        `[N, count]` float64, the top 53 bits of 64-bit draws: multiples of 2**-53.

    Raises:
        ValueError: seed, sequence, row, stream or count out of range, or rows and sequences of different shapes.
    """
    high_ND, low_ND = random_words(seed, sequence_N, row_N, stream=stream, count=count)
    return (high_ND << 21 | low_ND >> 11).to(torch.float64) * 2.0**-53


def scale_to(words: tuple[Tensor, Tensor], bound: Tensor) -> Tensor:
    """Uniform integers in [0, bound): the high 64 bits of a 64-bit draw times `bound`, exact.

    Args:
        words: (high, low) 32-bit words of the draws.
        bound: int64, 1 to 2**63 - 1, broadcastable against them.
    """
    high, low = words
    bound_high, bound_low = bound >> 32, bound & WORD
    outer, inner = low * bound_high, high * bound_low  # outer < 2**63; inner may wrap, so its sign bit is masked below
    middle = (low * bound_low >> 32 & WORD) + (outer & WORD) + (inner & WORD)
    return high * bound_high + (outer >> 32) + (inner >> 32 & WORD) + (middle >> 32)


def check_key(seed: int, stream: int, count: int) -> None:
    """Raise ValueError for a seed, stream or count out of range."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"`seed` came as {seed}, wanted 0 to 2**64 - 1: choose one in that range")
    if not 0 <= stream <= WORD or count < 1:
        raise ValueError(f"`stream` {stream} and `count` {count} came, wanted 0 to 2**32 - 1 and at least 1")


def check_range(name: str, low: int, high: int, bound: int) -> None:
    """Raise ValueError unless values that run from `low` to `high` are in [0, bound)."""
    if not 0 <= low <= high < bound:
        raise ValueError(f"`{name}` runs from {low} to {high}, wanted 0 to {bound - 1}")
