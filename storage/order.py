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
_BLOCK: Final = 1 << 14  # positions at a time, so that the scratch stays in the processor's cache
_MASK: Final = (1 << 64) - 1
_MIX_STEPS: Final = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    # The finaliser of splitmix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _round_keys(seed: int, epoch: int, part: int) -> npt.NDArray[np.uint64]:
    key_1 = _mix(np.array([(seed ^ 0x9E3779B97F4A7C15) & _MASK], np.uint64))
    key_1 = _mix(key_1 ^ np.uint64(epoch & _MASK))
    if part:
        key_1 = _mix(_mix(key_1 + np.uint64(0xD1B54A32D192ED03)) ^ np.uint64(part & _MASK))
    steps = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return _mix(key_1 + steps)


def _network(x_P: npt.NDArray[np.uint64], bits: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    if len(x_P) <= _BLOCK:
        return _network_block(x_P, bits, keys)
    return np.concatenate([_network_block(x_P[i : i + _BLOCK], bits, keys) for i in range(0, len(x_P), _BLOCK)])


def _network_block(x_P: npt.NDArray[np.uint64], bits: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """One pass of the Feistel network. Unbalanced where `bits` is odd: each round swaps the halves and their widths."""
    left_bits, right_bits = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    one = np.uint64(1)
    left_P, right_P = x_P >> right_bits, x_P & ((one << right_bits) - one)
    mixed_P, shifted_P = np.empty_like(x_P), np.empty_like(x_P)
    for key in keys:  # left, right = right, left ^ (mix(right + key) & mask), without a new array
        np.add(right_P, key, out=mixed_P)
        for shift, factor in _MIX_STEPS:
            np.right_shift(mixed_P, shift, out=shifted_P)
            np.bitwise_xor(mixed_P, shifted_P, out=mixed_P)
            np.multiply(mixed_P, factor, out=mixed_P)
        np.right_shift(mixed_P, np.uint64(31), out=shifted_P)
        np.bitwise_xor(mixed_P, shifted_P, out=mixed_P)
        np.bitwise_and(mixed_P, (one << left_bits) - one, out=mixed_P)
        np.bitwise_xor(left_P, mixed_P, out=left_P)
        left_P, right_P = right_P, left_P
        left_bits, right_bits = right_bits, left_bits
    return (left_P << right_bits) | right_P


def shuffle(size: int, *, seed: int, epoch: int, part: int = 0) -> npt.NDArray[np.int64]:
    """0..size-1 in a keyed order, all of it at once: sorted by 64-bit hashes.

    For the few (shards of a cache), where a Feistel network of a few bits gives some pairs more often than others.
    """
    keys = _round_keys(seed, epoch, part)
    hashed = _mix(_mix(np.arange(size, dtype=np.uint64) + keys[0]) ^ keys[1])
    return np.argsort(hashed, kind="stable").astype(np.int64)


def permute(
    position_P: npt.NDArray[np.int64], *, size: int, seed: int, epoch: int, part: int = 0
) -> npt.NDArray[np.int64]:
    """The sequence at every position of an epoch: a bijection of 0..size-1, another one for every (seed, epoch, part).

    Args:
        position_P: int64 positions in [0, size).
        size: number of sequences.
        seed: 64-bit key.
        epoch: number of the pass over the data.
        part: number of the permutation within the epoch, where it has several.

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
    bits, keys = (size - 1).bit_length(), _round_keys(seed, epoch, part)
    result_P = _network(position_P.astype(np.uint64).ravel(), bits, keys)
    outside_P = np.flatnonzero(result_P >= size)
    while outside_P.size:
        walked_P = _network(result_P[outside_P], bits, keys)
        result_P[outside_P] = walked_P
        outside_P = outside_P[walked_P >= size]
    return result_P.astype(np.int64).reshape(position_P.shape)
