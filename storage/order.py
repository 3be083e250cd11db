"""The order of sequences: a keyed permutation that is a pure function of (seed, epoch, position), with no state.

A Feistel network over the smallest power of two that holds `size`; outputs beyond `size` walk on along their cycle until
they fall inside, which keeps it a bijection (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).

Shapes: `P` positions.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

_ROUNDS: Final = 6  # 4 make a pseudo-random permutation of a large domain; small domains want a few more
_MASK: Final = (1 << 64) - 1


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    # The finaliser of splitmix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _round_keys(seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    key_1 = _mix(np.array([(seed ^ 0x9E3779B97F4A7C15) & _MASK], np.uint64))
    key_1 = _mix(key_1 ^ np.uint64(epoch & _MASK))
    steps = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return _mix(key_1 + steps)


def permute(position_P: npt.NDArray[np.int64], *, size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The sequence at every position of an epoch: a bijection of 0..size-1, another one for every (seed, epoch).

    Args:
        position_P: int64 positions in [0, size).
        size: number of sequences.
        seed: 64-bit key.
        epoch: number of the pass over the data.

    Returns:
        `[P]` int64.

    Raises:
        ValueError: a position is outside [0, size).
    """
    position_P = np.asarray(position_P, np.int64)
    if position_P.size and not (position_P.min() >= 0 and position_P.max() < size):
        raise ValueError(f"positions came from {position_P.min()} to {position_P.max()}, wanted 0 to {size - 1}")
    if size <= 1:
        return np.zeros_like(position_P)
    bits = (size - 1).bit_length()
    high_bits, low_bits = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    keys = _round_keys(seed, epoch)

    def network(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        # Unbalanced where `bits` is odd: each round swaps the halves and their widths.
        left, right, left_bits, right_bits = (
            x >> low_bits,
            x & ((np.uint64(1) << low_bits) - np.uint64(1)),
            high_bits,
            low_bits,
        )
        for key in keys:
            mask = (np.uint64(1) << left_bits) - np.uint64(1)
            left, right = right, left ^ (_mix(right + key) & mask)
            left_bits, right_bits = right_bits, left_bits
        return (left << right_bits) | right

    result_P = network(position_P.astype(np.uint64).ravel())
    while (outside := np.flatnonzero(result_P >= size)).size:
        result_P[outside] = network(result_P[outside])
    return result_P.astype(np.int64).reshape(position_P.shape)
