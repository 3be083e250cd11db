"""The codes: levels, unbiased rounding, and weights that sum to 1 and never fall below 0."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.storage import codes
from stillroom.storage.decode import decode_rows
from stillroom.storage.encode import encode_rows
from stillroom.storage.spec import MAX_DRAWS, SamplerSpec
from stillroom.storage.targets import SparseTargets


@pytest.mark.parametrize("draws", [1, 2, 50, 113, 114, 4096])
def test_the_pivot_parts_head_and_tail(draws):
    scale = codes.logp_scale(draws)
    assert scale.logp[codes.PIVOT] == scale.pivot_logp == np.float32(-math.log(draws))
    assert scale.logp[codes.PIVOT - 1] < scale.pivot_logp
    assert scale.logp[-1] == 0.0
    assert scale.logp[0] == pytest.approx(-math.log(draws) - codes.TAIL_NATS)
    np.testing.assert_allclose(np.log(scale.p), scale.logp, atol=draws / codes.UNIT)


def test_the_first_head_entry_never_falls_below_zero():
    # The module's argument with integers: whatever p_1 and tau, the worst error is less than p_1. Every legal N.
    for draws in range(2, MAX_DRAWS + 1):
        levels, tails = codes.logp_scale(draws).head_units, codes.tail_units(draws)
        steps = np.diff(levels)
        assert np.all(np.diff(steps) >= 0), draws  # Abel's summation needs steps that grow with p
        low = levels[:-1]  # p_1 lies in [low, low + step], tau below 1 - low
        code = np.minimum(np.searchsorted(tails, codes.UNIT - low, side="right") - 1, len(tails) - 2)
        tail_error = (tails[1:] - tails[:-1])[code]
        assert np.all(low - steps - tail_error > 0), draws


def test_rounding_is_unbiased_and_systematic():
    rng = np.random.default_rng(0)
    levels = codes.logp_scale(50).p[codes.PIVOT :]
    value = np.sort(rng.uniform(1 / 50, 0.4, 30))[::-1].copy()
    trials = 4000
    uniform = rng.random(trials)
    index = codes.round_systematic(
        np.tile(value, trials), levels, np.repeat(np.arange(trials) * 30, 30), np.repeat(uniform, 30)
    ).reshape(trials, 30)
    low = np.searchsorted(levels, value, side="right") - 1
    chance = (value - levels[low]) / (levels[low + 1] - levels[low])
    up = index - low
    assert set(np.unique(up)) <= {0, 1}
    # Ups of any run of neighbours are within 1 of their expectation: all runs that start at the first, and all others.
    error = np.cumsum(up - chance, axis=1)
    assert np.abs(error).max() < 1
    assert np.abs(error[:, 5:] - error[:, :1]).max() < 1
    # The mean of 4000 trials: standard deviation of a Bernoulli, 30 tests, 5 sigma.
    z = (up.mean(0) - chance) / np.sqrt(chance * (1 - chance) / trials + 1e-12)
    assert np.abs(z).max() < 5


@pytest.mark.parametrize("draws", [50, 1000])
def test_tail_mass_code_is_unbiased(draws):
    rng = np.random.default_rng(1)
    units = codes.tail_units(draws)
    for tau in (0.0, 1e-7, 0.003, 0.31, 0.98):
        decoded = units[codes.encode_tail_mass(np.full(20000, tau), draws, rng.random(20000))] / codes.UNIT
        sd = decoded.std() / math.sqrt(len(decoded))
        assert abs(decoded.mean() - tau) <= 5 * sd + 1e-15


def test_label_and_entropy_codes():
    logp = np.array([0.0, -0.004, -3.3, -500.0, -1e6, -np.inf, np.nan], np.float32)
    back = codes.decode_label_logp(codes.encode_label_logp(logp))
    assert np.abs(back[:4] - logp[:4]).max() <= 1 / 256
    assert back[4] == back[5] == -65534 / 128
    assert np.isnan(back[6])
    entropy = np.array([0.0, 0.5, math.log(1 << 24), np.nan], np.float32)
    back = codes.decode_entropy(codes.encode_entropy(entropy))
    assert np.abs(back[:3] - entropy[:3]).max() <= 1 / 30 + 1e-6
    assert np.isnan(back[3])


def round_trip(made, spec, p_rows, rng):
    """Targets of rows given as (head probabilities, tail entries), encoded and decoded."""
    offsets, ids, weights, logp = [0], [], [], []
    for head, tail in p_rows:
        tau = 1 - head.sum() if tail else 0.0
        ids.append(rng.choice(5000, len(head) + tail, replace=False))
        ids[-1][len(head) :].sort()
        weights.append(np.concatenate([head, np.full(tail, tau / max(tail, 1))]))
        logp.append(np.concatenate([np.log(head), np.full(tail, -math.log(spec.draws) - 3)]))
        offsets.append(offsets[-1] + len(ids[-1]))
    rows = len(p_rows)
    targets = SparseTargets(
        offsets=np.array(offsets),
        ids=np.concatenate(ids).astype(np.int32),
        weights=np.concatenate(weights).astype(np.float32),
        label_logp=np.zeros(rows, np.float32),
        entropy=np.zeros(rows, np.float32),
        logp=np.concatenate(logp).astype(np.float32),
    )
    manifest = made.manifest(spec, vocab_size=5000, seq_len=rows, sequences=1)
    raw = dict(encode_rows(manifest, np.zeros((1, rows + 1), np.uint32), targets, rng.random((rows, 3))).arrays)
    raw["id"] = raw["id"].astype(np.int32)
    return targets, decode_rows(spec, 5000, raw, logp=True)


@settings(max_examples=150, deadline=None)
@given(draws=st.integers(2, MAX_DRAWS), seed=st.integers(0, 1 << 32), flat=st.floats(0.0, 1.0))
def test_threshold_rows_sum_to_one_whatever_the_row(made, draws, seed, flat):
    # Head entries as near to 1/N as they come, as many as fit, and what is left for the tail.
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(4):
        most = draws - 1 if draws > 2 else 1
        heads = int(rng.integers(max(0, most - 10), most + 1))
        spread = rng.random(heads) * flat
        head = np.sort((1 + spread * (draws / max(heads, 1) - 1) * 0.999) / draws)[::-1] * (1 + 1e-7)
        head = head[: int(np.searchsorted(np.cumsum(head), 1 - 1e-6))]
        tau = 1 - head.sum()
        rows.append((head, max(1, int(draws * tau))))
    spec = SamplerSpec(draws=draws)
    _, decoded = round_trip(made, spec, rows, rng)
    assert decoded.weights.min() >= 0
    for row in range(4):
        weights = decoded.weights[decoded.offsets[row] : decoded.offsets[row + 1]]
        for order in (weights, weights[::-1], rng.permutation(weights)):
            assert np.add.accumulate(order, dtype=np.float32)[-1] == np.float32(1.0)


@pytest.mark.parametrize("heads", range(40, 50))
def test_flat_rows_near_the_threshold(made, heads):
    rng = np.random.default_rng(heads)
    rows = [(np.full(heads, (1 + 1e-6) / 50), 50 - heads) for _ in range(200)]
    _, decoded = round_trip(made, SamplerSpec(draws=50), rows, rng)
    assert decoded.weights.min() >= 0
    assert np.all(np.add.reduceat(decoded.weights, decoded.offsets[:-1], dtype=np.float32) == 1)
    assert np.all(decoded.weights[decoded.offsets[:-1]] > 0)


def test_decoded_weights_are_unbiased(made):
    # 3000 copies of one row: the mean of every weight against the truth, 5 sigma of its own scatter.
    head = np.array([0.31, 0.17, 0.0901, 0.04, 0.0203])
    rng = np.random.default_rng(7)
    rows = [(head, int(50 * (1 - head.sum())))] * 3000
    targets, decoded = round_trip(made, SamplerSpec(draws=50), rows, rng)
    total = np.zeros((3000, 6))
    for row in range(3000):
        mine = slice(decoded.offsets[row], decoded.offsets[row + 1])
        weight = dict(zip(decoded.ids[mine].tolist(), decoded.weights[mine].tolist(), strict=True))
        wanted = targets.ids[targets.offsets[row] : targets.offsets[row + 1]].tolist()
        total[row, :5] = [weight[i] for i in wanted[:5]]
        total[row, 5] = sum(weight[i] for i in wanted[5:])
    mean = total.mean(0)
    z = (mean - np.append(head, 1 - head.sum())) / (total.std(0) / math.sqrt(3000))
    assert np.abs(z).max() < 5
