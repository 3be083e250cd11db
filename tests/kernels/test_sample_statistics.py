"""Samplers, statistically: unbiased, and exactly as noisy as their formulas say.

Rows are independent and share one distribution, so every count below has a known law; no bound is tuned.

- One id. Hits over `N` rows are binomial, exactly: for `random` of N * draws trials with p; for `systematic` what exceeds
  floor(draws * p) in each row is one trial with f = frac(draws * p); for a `threshold` tail id the inclusion is one trial with
  pi = p * m / tail mass; for `stratified` an id is hit for sure by each stratum it fills and with a chance of its own by the
  at most two it shares, so what exceeds the sure hits is two trials in each row: no wider than 2N binomial trials of the
  mean chance (Hoeffding 1956, On the distribution of the number of successes in independent trials).
  "Within 4 standard errors for every id" is asked as 4 standard errors for the worst of them: 4 SE
  has a two-sided normal level of 6.3e-5, so each of the n ids tested must have a two-sided exact binomial level of at
  least 6.3e-5 / n. (Plain 4 SE at each of 1,000 ids would be missed by chance once in 16 runs, more often for skewed
  counts near 10.) Ids expected fewer than 10 times are left to the next test.
- Ids pooled by rank, so that the far tail is tested too: a pool's mass is one number per row; mean against p, in standard errors
  of the rows' own spread, again at 6.3e-5 over the number of pools.
- Noise: ||estimate - p||**2 is one number per row; its mean must be the sum of the variances of the formula, within 4
  standard errors of the rows' own spread.

Shapes: `N` rows, `V` vocabulary, `E` entries.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt
import pytest
import torch

from stillroom.kernels.sample import sample
from stillroom.kernels.targets import SparseTargets

Array = npt.NDArray[np.float64]
LEVEL: Final = 6.334e-5  # two-sided, beyond 4 standard errors
DRAWS: Final = 50
SHAPES: Final = ("peaked", "medium", "flat")


def _logits(shape: str, vocabulary: int) -> torch.Tensor:
    """One row, ids shuffled: largest p about 0.9 / 0.13 / below 1/50; entropies 0.6 / 4.5 to 5.5 / nearly log V."""
    generator = torch.Generator().manual_seed(5)
    rank_V = torch.arange(vocabulary, dtype=torch.float32)
    logits_V = {
        "peaked": -2.0 * torch.log(rank_V + 0.3),
        "medium": -1.15 * torch.log(rank_V + 1.0),
        "flat": 0.5 * torch.randn(vocabulary, generator=generator),
    }[shape]
    return logits_V[torch.randperm(vocabulary, generator=generator)]


def _draw(kind: str, logits_V: torch.Tensor, rows: int, seed: int = 0) -> SparseTargets:
    return sample(
        logits_V.expand(rows, -1),
        torch.full((rows,), -100),
        kind=kind,
        draws=DRAWS,
        seed=seed,
        sequence_N=torch.arange(rows) // 1000,
        row_N=torch.arange(rows) % 1000,
        exponent=0.8 if kind == "importance" else 1.0,
    )


def _log_binomial(hits: Array, trials: int) -> Array:
    """Log of the binomial coefficient."""
    size = torch.tensor(float(trials), dtype=torch.float64)
    hit = torch.from_numpy(hits)
    return (torch.lgamma(size + 1) - torch.lgamma(hit + 1) - torch.lgamma(size - hit + 1)).numpy()


def _two_sided(hits: Array, trials: int, p: Array) -> Array:
    """Twice the smaller tail of Binomial(trials, p), observed value included. Sums outwards until terms vanish."""
    p = np.clip(p, 1e-300, 1 - 1e-12)
    level = np.empty(len(hits))
    for index, (hit, chance) in enumerate(zip(hits, p)):
        width = 60 * math.sqrt(trials * chance * (1 - chance)) + 60
        below = hit < trials * chance
        start, stop = (max(0.0, hit - width), hit) if below else (hit, min(float(trials), hit + width))
        k = np.arange(start, stop + 1)
        log_mass = _log_binomial(k, trials) + k * math.log(chance) + (trials - k) * math.log1p(-chance)
        level[index] = min(1.0, 2 * np.exp(log_mass).sum())
    return level


def _laws(kind: str, p: Array, rows: int) -> tuple[Array, Array, int, float]:
    """Of each id: hits per row that are certain, chance of one more; trials; weight of one hit."""
    if kind == "random":
        return np.zeros_like(p), p, rows * DRAWS, 1 / DRAWS
    if kind == "systematic":
        return np.floor(DRAWS * p), DRAWS * p - np.floor(DRAWS * p), rows, 1 / DRAWS
    if kind == "stratified":
        certain, first, last = _strata(p)
        return certain, (first + last) / 2, 2 * rows, 1 / DRAWS
    tail = np.where(p >= 1 / DRAWS, 0.0, p)
    many = max(1, math.floor(DRAWS * tail.sum() * (1 + 1e-12)))  # a tail that is all of p may sum to a bit less than 1
    return np.zeros_like(p), tail * many / tail.sum(), rows, tail.sum() / many


def _strata(p: Array) -> tuple[Array, Array, Array]:
    """Strata each id fills, and its shares of the one it begins in and the one it ends in (0 if that is the same one)."""
    end = np.cumsum(p) * DRAWS
    begin = end - p * DRAWS
    inside = np.floor(begin) == np.floor(end)
    first = np.where(inside, end - begin, np.ceil(begin) - begin)
    last = np.where(inside, 0.0, end - np.floor(end))
    return np.where(inside, 0.0, np.floor(end) - np.ceil(begin)), first, last


def _noise(kind: str, p: Array) -> float:
    """Sum over ids of the variance of one row's estimate."""
    if kind == "random":
        return float((1 - (p**2).sum()) / DRAWS)
    if kind == "stratified":
        _, first, last = _strata(p)
        return float((first * (1 - first) + last * (1 - last)).sum()) / DRAWS**2
    _, chance, _, value = _laws(kind, p, 1)
    return float((value**2 * chance * (1 - chance)).sum())


def _pools(p: Array, rows: int) -> npt.NDArray[np.int64]:
    """Pool of each id, by rank; the last ones are merged until 1,000 draws fall there, enough for a normal law."""
    rank = np.empty(len(p), np.int64)
    rank[np.argsort(-p, kind="stable")] = np.arange(len(p))
    edges = [1, 4, 16, 64, 256, 1024, 4096, 16384]
    while edges and (edges[-1] >= len(p) or p[rank >= edges[-1]].sum() * DRAWS * rows < 1000):
        edges.pop()
    return np.digitize(rank, edges)


def check_unbiased(kind: str, targets: SparseTargets, p: Array) -> None:
    """Raise AssertionError unless the targets could be `kind`'s draws from p."""
    rows, ids = targets.rows, targets.ids.numpy()
    row_E, weights = targets.entry_rows().numpy(), targets.weights.numpy().astype(np.float64)

    # each float32 weight is within 2**-24 of its value, relatively, and the values sum to exactly 1
    sums = np.bincount(row_E, weights, minlength=rows)
    assert np.abs(sums - 1).max() <= 2**-24 * (1 + 1e-6), "row sums"

    certain, chance, trials, value = _laws(kind, p, rows)
    exact = (p >= 1 / DRAWS) if kind == "threshold" else np.zeros(len(p), bool)
    mean = np.bincount(ids, weights, minlength=len(p)) / rows
    # the head is p itself: float32 logits and the weights' polynomial leave a few 1e-6
    assert np.allclose(mean[exact], p[exact], rtol=1e-5, atol=0), "head"
    hits = np.rint(mean * rows / value) - certain * rows
    tested = ~exact & (trials * chance >= 10) & (trials * (1 - chance) >= 10)
    levels = _two_sided(hits[tested], trials, chance[tested])
    assert levels.min(initial=1.0) > LEVEL / max(1, tested.sum()), "ids"

    pool = _pools(p, rows)
    for number in np.unique(pool):
        mass = np.bincount(row_E, weights * (pool[ids] == number), minlength=rows)
        wanted = p[pool == number].sum()
        error = mass.std(ddof=1) / math.sqrt(rows)
        # 4.6 SE: two-sided normal level 6.3e-5 over at most 9 pools is 4.5 SE, a little more for skew
        assert abs(mass.mean() - wanted) <= 4.6 * error + 1e-5 * wanted, f"pool {number}"

    squares = np.bincount(row_E, weights**2 - 2 * weights * p[ids], minlength=rows) + (p**2).sum()
    error = squares.std(ddof=1) / math.sqrt(rows)
    assert abs(squares.mean() - _noise(kind, p)) <= 4 * error + 1e-5 * (p**2).sum(), "noise"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["threshold", "random", "systematic", "stratified"])
@pytest.mark.parametrize(
    ("vocabulary", "rows"),
    [(1_000, 20_000), (50_000, 1_000), pytest.param(50_000, 20_000, marks=pytest.mark.slow)],
)
def test_unbiased_with_the_noise_of_its_formula(kind: str, shape: str, vocabulary: int, rows: int) -> None:
    """1,000 rows of 50 draws are 50,000 draws; the slow case draws 20,000 rows of them."""
    logits_V = _logits(shape, vocabulary)
    p = logits_V.double().softmax(0).numpy()
    check_unbiased(kind, _draw(kind, logits_V, rows), p)


@pytest.mark.parametrize("shape", SHAPES)
def test_stratified_noise_lies_between(shape: str) -> None:
    """By the formulas, for any p, and in the draws themselves, where the gaps are many standard errors."""
    logits_V = _logits(shape, 1_000)
    p = logits_V.double().softmax(0).numpy()
    assert _noise("systematic", p) < _noise("stratified", p) < _noise("random", p)
    measured = {}
    for kind in ("systematic", "stratified", "random"):
        targets = _draw(kind, logits_V, 20_000)
        ids, weights = targets.ids.numpy(), targets.weights.numpy().astype(np.float64)
        measured[kind] = float((weights**2 - 2 * weights * p[ids]).sum()) / targets.rows
    assert measured["systematic"] < measured["stratified"] < measured["random"]


@pytest.mark.parametrize("shape", SHAPES)
def test_renormalised_top_k_would_fail(shape: str) -> None:
    """The check above has teeth: the same number of entries, chosen as top-k and renormalised, does not pass."""
    rows, vocabulary = 20_000, 1_000
    logits_V = _logits(shape, vocabulary)
    p = logits_V.double().softmax(0).numpy()
    threshold = _draw("threshold", logits_V, rows)
    keep = threshold.ids.numel() // rows
    top = torch.from_numpy(p).topk(keep)
    weights = (top.values / top.values.sum()).float().repeat(rows)
    topk = SparseTargets(
        torch.arange(rows + 1) * keep, top.indices.int().repeat(rows), weights, threshold.label_logp, threshold.entropy
    )
    with pytest.raises(AssertionError):
        check_unbiased("threshold", topk, p)


@pytest.mark.parametrize("shape", SHAPES)
def test_small_mistakes_would_fail(shape: str) -> None:
    """A tail weighed by N * p instead of its mass over m, and draws that all share one offset."""
    rows = 20_000
    logits_V = _logits(shape, 1_000)
    p = logits_V.double().softmax(0).numpy()
    threshold = _draw("threshold", logits_V, rows)
    one = _draw("threshold", logits_V, 1)
    same = SparseTargets(
        torch.arange(rows + 1) * one.ids.numel(), one.ids.repeat(rows), one.weights.repeat(rows),
        threshold.label_logp, threshold.entropy,
    )  # fmt: skip
    with pytest.raises(AssertionError):
        check_unbiased("threshold", same, p)
    if shape != "flat":  # there the tail is everything and 1/N is its weight
        sampled_E = torch.from_numpy(p)[threshold.ids.long()] < 1 / DRAWS
        weights = torch.where(sampled_E, 1 / DRAWS, threshold.weights)
        with pytest.raises(AssertionError, match="row sums"):
            check_unbiased("threshold", replace(threshold, weights=weights), p)


@pytest.mark.parametrize("exponent", [0.7, 1.3])
@pytest.mark.parametrize("shape", SHAPES)
def test_exponent_is_unbiased(shape: str, exponent: float) -> None:
    """q ~ p**t with weights count/N * p/q: mean p, variance of an id p**2 (1/q - 1) / N, for ids drawn 100 times or more."""
    rows = 20_000
    logits_V = _logits(shape, 1_000)
    targets = sample(
        logits_V.expand(rows, -1), torch.full((rows,), -100), kind="random", draws=DRAWS, seed=3,
        sequence_N=torch.zeros(rows, dtype=torch.int64), row_N=torch.arange(rows), exponent=exponent,
    )  # fmt: skip
    p = logits_V.double().softmax(0).numpy()
    q = (logits_V.double() * exponent).softmax(0).numpy()
    hits = np.bincount(targets.ids.numpy(), targets.weights.numpy() * (q / p)[targets.ids.numpy()], minlength=len(p))
    tested = rows * DRAWS * q >= 10
    levels = _two_sided(np.rint(hits * DRAWS)[tested], rows * DRAWS, q[tested])
    assert levels.min() > LEVEL / tested.sum()
    counts = targets.weights.double().numpy() * DRAWS * (q / p)[targets.ids.numpy()]
    assert np.abs(counts - np.rint(counts)).max() < 1e-3  # the weight is count/N * p/q, nothing else
    assert np.allclose(np.bincount(targets.entry_rows().numpy(), np.rint(counts)), DRAWS)
