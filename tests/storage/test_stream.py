"""The streaming order: a bijection every epoch, few shards at a time, a pure function of the position."""

from __future__ import annotations

import json
import pickle
import time

import numpy as np
import pytest

from stillroom.storage.errors import InputError
from stillroom.storage.order import permute
from stillroom.storage.stream import StreamOrder

LENGTHS = [16] * 11 + [5]  # the last shard of a cache is shorter


def windows(order: StreamOrder, epoch: int):
    """The windows of an epoch."""
    position = epoch * order.size
    while position < (epoch + 1) * order.size:
        window = order.window_at(position)
        assert window.start == position
        yield window
        position = window.stop


@pytest.mark.parametrize("window", [1, 2, 3, 5, 7, 11, 12, None])
@pytest.mark.parametrize("lengths", [LENGTHS, [7], [1, 1, 1], [3, 100, 1, 40]])
def test_every_epoch_holds_every_sequence_once(lengths, window):
    order = StreamOrder(lengths, seed=5, window=window)
    drawn = order.sequences(0, 3 * order.size).reshape(3, -1)
    assert drawn.dtype == np.int64
    np.testing.assert_array_equal(np.sort(drawn, axis=1), np.tile(np.arange(sum(lengths)), (3, 1)))


@pytest.mark.parametrize("window", [1, 2, 3, 5, 11])
def test_a_window_never_touches_more_than_w_shards(window):
    order = StreamOrder(LENGTHS, seed=3, window=window)
    shard_of = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    for epoch in range(20):
        seen = []
        for part in windows(order, epoch):
            touched = set(shard_of[order.sequences(part.start, part.stop)].tolist())
            assert touched == set(part.places)
            assert len(part.places) == len(touched) <= window
            seen += part.places
        assert sorted(seen) == list(range(len(LENGTHS)))  # and a shard is wanted in one window only


def test_windows_are_even():
    counts = [len(window.places) for window in windows(StreamOrder([4] * 17, seed=0, window=8), 0)]
    assert sorted(counts) == [5, 6, 6]


def test_all_shards_in_one_window_is_the_permutation_of_everything():
    for window in (12, 99, None):
        order = StreamOrder(LENGTHS, seed=9, window=window)
        for epoch in (0, 4):
            drawn = order.sequences(epoch * order.size, (epoch + 1) * order.size)
            np.testing.assert_array_equal(drawn, permute(np.arange(order.size), size=order.size, seed=9, epoch=epoch))
    # where the shards are cut plays no part then
    np.testing.assert_array_equal(StreamOrder([181], seed=9).sequences(5, 400), order.sequences(5, 400))


@pytest.mark.parametrize("window", [3, None])
def test_any_part_is_a_part_of_the_whole(window):
    order = StreamOrder(LENGTHS, seed=1, window=window)
    whole = order.sequences(0, 2 * order.size)
    for start in range(0, 2 * order.size, 7):
        for length in (0, 1, 30, order.size):
            np.testing.assert_array_equal(order.sequences(start, start + length)[: len(whole) - start],
                                          whole[start : start + length])  # fmt: skip


def test_epochs_and_seeds_have_their_own_order():
    size = sum(LENGTHS)
    orders = [
        StreamOrder(LENGTHS, seed=seed, window=window).sequences(epoch * size, (epoch + 1) * size)
        for seed, epoch, window in ((0, 0, 4), (0, 1, 4), (1, 0, 4), (2**64 - 1, 7, 4), (0, 0, None))
    ]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert np.count_nonzero(one == other) < 20  # chance: 1 to 3 on average


def test_the_shards_of_a_window_are_mixed():
    # Within a window of 4 x 256 the shard at each position is a draw without replacement: chi-square over 16 blocks of 64
    # positions, (16 - 1) * (4 - 1) = 45 degrees of freedom. Mean 45, standard deviation 9.5 (less: no replacement)
    # and 5 of them above is 92.
    order = StreamOrder([256] * 8, seed=2, window=4)
    for window in windows(order, 0):
        shard_P = order.sequences(window.start, window.stop) // 256
        table = np.array(
            [[np.count_nonzero(block == place) for place in window.places] for block in shard_P.reshape(16, 64)]
        )
        assert ((table - 16) ** 2 / 16).sum() < 92


def test_shards_meet_other_shards_every_epoch():
    # 2000 epochs of 8 shards in windows of 2: the partner of shard 0 is uniform over 7. Chi-square, 6 degrees of freedom:
    # mean 6, standard deviation 3.5; 6 of them above is 27.
    order = StreamOrder([1] * 8, seed=0, window=2)
    met = np.zeros(8)
    for epoch in range(2000):
        for window in windows(order, epoch):
            if 0 in window.places:
                met[[place for place in window.places if place != 0]] += 1
    assert met.sum() == 2000
    assert ((met[1:] - 2000 / 7) ** 2 / (2000 / 7)).sum() < 27


def test_the_first_sequences_only():
    order = StreamOrder(LENGTHS, seed=0, window=2, sequences=40)
    assert (order.size, order.shards) == (40, 3)  # 16 + 16 + 8
    np.testing.assert_array_equal(np.sort(order.sequences(0, 40)), np.arange(40))
    assert StreamOrder(LENGTHS, seed=0, sequences=10_000).size == sum(LENGTHS)


def test_resume_at_every_position_is_exact():
    order = StreamOrder(LENGTHS, seed=4, window=3)
    whole = order.sequences(0, 3 * order.size)
    for position in range(2 * order.size + 1):
        text = json.dumps(order.state_dict(position, manifest="m"))
        resumed = StreamOrder(LENGTHS, seed=4, window=3)
        there = resumed.position_of(json.loads(text), manifest="m")
        assert there == position
        np.testing.assert_array_equal(resumed.sequences(there, there + 16), whole[position : position + 16])


def test_the_state_is_small_and_says_what_it_is_of():
    state = StreamOrder(LENGTHS, seed=4, window=3).state_dict(2 * 181 + 7, manifest="m")
    assert state == {
        "schema": 1, "seed": 4, "epoch": 2, "position": 7, "window": 3, "sequences": 181, "manifest": "m",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema": 2}, "schema"), ({"seed": 5}, "seed"), ({"window": 4}, "window"), ({"sequences": 180}, "sequences"),
        ({"manifest": "n"}, "manifest"), ({"position": 181}, "damaged"), ({"position": -1}, "damaged"),
        ({"epoch": None}, "damaged"), ({"epoch": -1}, "damaged"), ({"position": 1.0}, "damaged"),
    ],
)  # fmt: skip
def test_a_state_of_something_else_is_refused(change, named):
    order = StreamOrder(LENGTHS, seed=4, window=3)
    with pytest.raises(InputError, match=named):
        order.position_of({**order.state_dict(9, manifest="m"), **change}, manifest="m")


def test_bad_settings_are_refused():
    with pytest.raises(InputError, match="no sequence"):
        StreamOrder([], seed=0)
    with pytest.raises(InputError, match="at least 1"):
        StreamOrder([4], seed=0, window=0)


def test_it_can_be_pickled():
    order = StreamOrder(LENGTHS, seed=4, window=3)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(order)).sequences(3, 200), order.sequences(3, 200))


def test_frozen_values():
    # A changed order would break the resumption of every run in the world.
    order = StreamOrder([100] * 10, seed=42, window=3)
    np.testing.assert_array_equal(order.sequences(2998, 3006), FROZEN)


def test_speed():
    # 10 M positions per CPU-second for the shards of the size DESIGN gives; the best of ten, as other processes share the core.
    order, best = StreamOrder([4096] * 12_000, seed=1, window=8), 0.0
    order.sequences(0, 1)
    for k in range(10):
        start = time.process_time()
        order.sequences(k << 18, (k + 1) << 18)
        best = max(best, (1 << 18) / (time.process_time() - start))
    assert best > 10e6


FROZEN = [602, 223, 995, 91, 240, 928, 963, 222]
