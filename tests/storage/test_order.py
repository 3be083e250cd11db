"""The order of sequences is a permutation, another one every epoch, and a pure function."""

from __future__ import annotations

import numpy as np
import pytest

from stillroom.storage.order import permute


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 8, 9, 31, 64, 65, 1000, 4097, 65537])
def test_bijection(size):
    seen = permute(np.arange(size), size=size, seed=3, epoch=1)
    assert seen.dtype == np.int64
    np.testing.assert_array_equal(np.sort(seen), np.arange(size))


def test_every_epoch_and_seed_has_its_own_order():
    orders = [permute(np.arange(500), size=500, seed=s, epoch=e) for s, e in ((0, 0), (0, 1), (1, 0), (2**64 - 1, 7))]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert np.count_nonzero(one == other) < 20  # chance: 1 on average
    np.testing.assert_array_equal(orders[1], permute(np.arange(500), size=500, seed=0, epoch=1))


def test_any_part_is_a_part_of_the_whole():
    whole = permute(np.arange(777), size=777, seed=5, epoch=2)
    picked = np.array([[5, 776], [0, 5]])
    np.testing.assert_array_equal(permute(picked, size=777, seed=5, epoch=2), whole[picked])
    assert permute(np.zeros(0, np.int64), size=777, seed=5, epoch=2).shape == (0,)


def test_every_place_is_as_likely():
    # 2000 epochs of 8 sequences: chi-square of the 8 x 8 table of (position, sequence), 49 degrees of freedom.
    # Mean 49, standard deviation 9.9: 5 of them above is 98.5.
    table = np.zeros((8, 8))
    for epoch in range(2000):
        table[np.arange(8), permute(np.arange(8), size=8, seed=11, epoch=epoch)] += 1
    assert ((table - 250) ** 2 / 250).sum() < 98.5


def test_frozen_values():
    # A changed order would break the resumption of every run in the world.
    np.testing.assert_array_equal(permute(np.arange(6), size=1000, seed=42, epoch=3), FROZEN)


def test_outside_positions_are_refused():
    with pytest.raises(ValueError, match="wanted 0 to 9"):
        permute(np.array([10]), size=10, seed=0, epoch=0)


FROZEN = [577, 686, 294, 199, 806, 398]
