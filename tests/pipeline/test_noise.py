"""The closed forms of `noise` against the sampler itself, and `intervals` against tables and by coverage."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stillroom.kernels.sample import sample
from stillroom.pipeline.intervals import Estimate, mean_of, ratio_of, student_t
from stillroom.pipeline.noise import squared_error

VOCABULARY, REPEATS = 48, 2000


def _logits(sharpness: float) -> torch.Tensor:
    return sharpness * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3))


def _squared(logits_V: torch.Tensor, kind: str, draws: int, exponent: float = 1.0) -> np.ndarray:
    """Squared distance from the teacher of independent draws of one row, `[REPEATS]`."""
    logits_NV = logits_V.expand(REPEATS, -1)
    row_N = torch.arange(REPEATS)
    none_N = torch.full_like(row_N, -100)
    targets = sample(
        logits_NV, none_N, kind=kind, draws=draws, seed=5, sequence_N=row_N, row_N=row_N % 7, exponent=exponent
    )
    weights_NV = torch.zeros(REPEATS, VOCABULARY, dtype=torch.float64)
    weights_NV[targets.entry_rows(), targets.ids.long()] = targets.weights.double()
    return ((weights_NV - logits_V.double().softmax(-1)) ** 2).sum(1).numpy()


@pytest.mark.parametrize("sharpness", [0.5, 4.0])
@pytest.mark.parametrize("draws", [1, 20])
@pytest.mark.parametrize("kind", ["threshold", "systematic", "stratified", "random"])
def test_formula_is_what_the_sampler_does(kind: str, draws: int, sharpness: float) -> None:
    logits_V = _logits(sharpness)
    found_R = _squared(logits_V, kind, draws)
    expected = float(squared_error(logits_V[None], kind, draws)[0])
    # 16 comparisons; a normal mean strays 4.5 standard errors once in 9,000 runs of all of them. Weights are float32.
    assert abs(found_R.mean() - expected) <= 4.5 * found_R.std(ddof=1) / REPEATS**0.5 + 1e-7 * (1 + expected)


def test_formula_with_a_proposal_exponent() -> None:
    logits_V = _logits(2.0)
    for exponent in (0.6,):
        found_R = _squared(logits_V, "random", 20, exponent)
        expected = float(squared_error(logits_V[None], "random", 20, exponent=exponent)[0])
        assert abs(found_R.mean() - expected) <= 4.5 * found_R.std(ddof=1) / REPEATS**0.5
        assert expected > float(squared_error(logits_V[None], "random", 20)[0])  # exponent 1 is the best per draw


def test_top_k_error_is_its_bias() -> None:
    logits_V = _logits(2.0)
    assert _squared(logits_V, "top_k", 5)[0] == pytest.approx(
        float(squared_error(logits_V[None], "top_k", 5)[0]), rel=1e-5
    )
    with pytest.raises(ValueError, match="top_p"):
        squared_error(logits_V[None], "top_p", 5)


def test_students_t_is_the_tables() -> None:
    table = {1: 12.706, 2: 4.3027, 3: 3.1824, 5: 2.5706, 7: 2.3646, 15: 2.1314, 30: 2.0423, 1000: 1.9623}
    for degrees, value in table.items():
        assert student_t(degrees) == pytest.approx(value, rel=3e-3), degrees


def test_intervals_cover_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    runs = 4000
    means = [mean_of(rng.normal(10, 3, 8)) for _ in range(runs)]
    inside = sum(each.low <= 10 <= each.high for each in means)
    assert abs(inside - 0.95 * runs) <= 4.5 * (runs * 0.95 * 0.05) ** 0.5  # 62 of 4,000
    ratios = []
    for _ in range(runs):
        size = rng.uniform(50, 150, 64)
        ratios.append(ratio_of(0.25 * size + rng.normal(0, 3, 64), size))
    inside = sum(each.low <= 0.25 <= each.high for each in ratios)
    assert abs(inside - 0.95 * runs) <= 4.5 * (runs * 0.95 * 0.05) ** 0.5 + 0.01 * runs  # the ratio's own bias


def test_product_of_estimates() -> None:
    product = Estimate(10.0, 9.0, 11.0, "measured").times(Estimate.exactly(3.0))
    assert (product.value, product.source) == (30.0, "measured")
    assert (product.low, product.high) == pytest.approx((27.0, 33.0))
    both = Estimate(10.0, 9.0, 11.0, "measured").times(Estimate(5.0, 4.5, 5.5, "measured"))
    assert (both.high - both.value) / both.value == pytest.approx(0.1 * 2**0.5)
