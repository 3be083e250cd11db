"""Chances under the null: every p-value of the audit comes from here, and none needs more rows than there are.

Each is an exact or an upper bound on the chance that a sound cache shows as much. Which assumption each makes:

- `bernstein`: independent bounded terms of known variance (rows: their draws are independent given the teacher)
- `most_deviant`, `more_deviant`: the recomputation and the control run are exchangeable as deviations go, up to a stated factor
- `conditional`: cached rows and freshly drawn ones hit with the same chance, row by row
- `e_value`: each row's likelihood ratio has mean at most 1 given the rows before it (Ville 1939; Shafer et al., 2011)

Shapes: `R` rows, `T` tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

FALSE_ALARM: Final = 1e-3  # of a whole audit of a sound cache
FloatR = npt.NDArray[np.float64]


def bernstein(total: float, variance: float, largest: float) -> float:
    """Two-sided chance that a sum of independent terms of mean 0 lies as far out as `total` (Bernstein, 1924).

    2 exp(-t**2 / (2 (V + M t / 3))), at most 1: no assumption on their distribution but the variance V of the sum and the
    largest M of their absolute values.
    """
    t = abs(total)
    if t <= 0.0:
        return 1.0
    scale = variance + largest * t / 3
    return 0.0 if scale <= 0 else min(1.0, 2 * math.exp(-(t**2) / (2 * scale)))


def most_deviant(above: int, rows: int, control_rows: int) -> float:
    """Chance that the `above` largest of rows + control_rows exchangeable deviations all belong to the cache.

    prod (R - i) / (R + C - i): the precedence test (Nelson, 1963). `above` counts the rows beyond every control row.
    """
    if above > rows:
        raise ValueError(f"{above} rows of {rows} came: count rows")
    if above == rows:  # the product would be right too, but slow where there are millions
        above = min(above, 4096)
    steps = np.arange(min(above, 4096))
    return float(np.exp(np.log((rows - steps) / (rows + control_rows - steps)).sum()))


def more_deviant(wins: int, pairs: int) -> float:
    """Chance of at least `wins` heads in `pairs` fair tosses: the sign test, by Chernoff's bound exp(-n KL(w/n || 1/2))."""
    return binomial_tail(wins, pairs, 0.5)


def binomial_tail(hits: int, trials: int, chance: float) -> float:
    """P(Bin(trials, chance) >= hits), exact below 10,000 trials, Chernoff's bound above.

    It bounds independent trials of different chances too, where `chance` is their mean and hits lie above it (Hoeffding, 1956).
    """
    if hits <= trials * chance or trials == 0:
        return 1.0
    if chance <= 0.0:
        return 0.0
    if trials > 10_000:
        share = hits / trials
        rest = (1 - share) * math.log((1 - share) / (1 - chance)) if share < 1 else 0.0
        return math.exp(-trials * (share * math.log(share / chance) + rest))
    k = np.arange(hits, trials + 1)
    logs = np.cumsum(np.concatenate([[0.0], np.log(np.arange(1, trials + 1))]))
    terms = logs[trials] - logs[k] - logs[trials - k] + k * math.log(chance) + (trials - k) * math.log1p(-chance)
    return float(min(1.0, np.exp(terms).sum()))


def conditional(cached: int, drawn: int, batches: int) -> float:
    """Chance that at least `cached` of cached + drawn hits are the cache's, where `drawn` come from `batches` fresh draws.

    Given their number, hits of equal chance fall on the cache with probability 1 / (1 + batches) each (Przyborowski and
    Wilenski, 1940).
    """
    return binomial_tail(cached, cached + drawn, 1 / (1 + batches))


def e_value(ratio_R: FloatR) -> tuple[float, float]:
    """Logarithm of the product of likelihood ratios of mean <= 1, and the chance that it is as large: at most 1 / product.

    Ratios are clipped to e**30, which can only make the product smaller.
    """
    log = float(np.log(np.clip(ratio_R, 1e-300, math.exp(30.0))).sum())
    return log, min(1.0, math.exp(-max(log, 0.0)) if log < 700 else 0.0)


def holm(p_T: Sequence[float], level: float = FALSE_ALARM) -> list[float]:
    """Threshold of each test by Holm (1979): reject where p <= threshold; the chance of any false alarm stays below `level`.

    The step-down stops at the first test it does not reject: those after it share its threshold.
    """
    order = sorted(range(len(p_T)), key=lambda index: p_T[index])
    thresholds, threshold, rejecting = [0.0] * len(p_T), level, True
    for place, index in enumerate(order):
        if rejecting:
            threshold = level / (len(p_T) - place)
            rejecting = p_T[index] <= threshold
        thresholds[index] = threshold
    return thresholds
