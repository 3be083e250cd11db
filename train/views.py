"""Sums of figures over groups of rows, and what they say: means, the reliability curve, figures by frequency and by position.

A further view is one more `Grouping`. Memory is one number for each figure and group, whatever the number of rows.

Shapes: `N` rows of a chunk, `F` figures, `G` groups, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import torch

from stillroom.train.figures import Rows, Values

BINS: Final = 15
DECILES: Final = 10
PARTLY_KNOWN: Final = "top1_agreement"  # of the rows that can tell; any other figure is of all rows or of none
FloatG = npt.NDArray[np.float64]
IntV = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Bin:
    """One bin of the reliability curve.

    Attributes:
        above, upto: limits of the student's top-1 probability: above < confidence <= upto.
        rows: how many fall in it.
        confidence: their mean top-1 probability, None where there are none.
        hit_rate: share of them whose next token was the student's first choice.
    """

    above: float
    upto: float
    rows: int
    confidence: float | None
    hit_rate: float | None


@dataclass(frozen=True, slots=True)
class Group:
    """Means over the rows of one group of a view.

    Attributes:
        first, last: least and greatest number in the group: of occurrences, or of the position.
        rows: how many.
        lm_loss, kl, top1_agreement, acceptance, teacher_lm_loss: as in `Evaluation`.
        top1_rows: rows `top1_agreement` is a mean over, where these are not all.
    """

    first: int
    last: int
    rows: int
    lm_loss: float
    kl: float | None = None
    top1_agreement: float | None = None
    acceptance: float | None = None
    teacher_lm_loss: float | None = None
    top1_rows: int | None = None


@dataclass(frozen=True, slots=True)
class Grouping:
    """Which of `count` groups each row belongs to.

    Attributes:
        count: groups.
        of: rows and their values to numbers of groups, int64 `[N]`.
    """

    count: int
    of: Callable[[Rows, Values], torch.Tensor]


def by_label(vocab_size: int) -> Grouping:
    """A group for each token."""
    return Grouping(vocab_size, lambda rows, values: rows.label_N)


def by_confidence() -> Grouping:
    """Bins (b/15, (b+1)/15] of the student's top-1 probability."""
    return Grouping(BINS, lambda rows, values: (values["confidence"] * BINS).ceil().long().sub_(1).clamp_(0, BINS - 1))


def by_position(seq_len: int) -> Grouping:
    """Position 0, 1, 2 to 3, 4 to 7, ...: group g > 0 holds 2**(g-1) to 2**g - 1."""
    count = (seq_len - 1).bit_length() + 1
    starts = torch.tensor([1 << group for group in range(count - 1)])
    return Grouping(
        count, lambda rows, values: torch.bucketize(rows.position_N, starts.to(rows.position_N.device), right=True)
    )


def by_sequence(sequences: int) -> Grouping:
    """A group for each sequence."""
    return Grouping(sequences, lambda rows, values: rows.sequence_N)


@final
class Sums:
    """Sums by group, float64.

    Args:
        names: figures.
        grouping: of rows.
        device: where they are summed.

    Attributes:
        names: figures.
        sum_FG: sums of the values.
        known_FG: how many rows could tell.
        rows_G: rows of each group.
    """

    def __init__(self, names: Sequence[str], grouping: Grouping, device: torch.device) -> None:
        self.names = tuple(names)
        self.sum_FG = torch.zeros(len(names), grouping.count, dtype=torch.float64, device=device)
        self.known_FG = torch.zeros_like(self.sum_FG)
        self.rows_G = torch.zeros_like(self.sum_FG[0])
        self._of = grouping.of
        self._partly_F1 = torch.tensor([[name == PARTLY_KNOWN] for name in names], device=device)

    def add(self, rows: Rows, values: Values) -> None:
        """Count a chunk."""
        group_N = self._of(rows, values)
        value_FN = torch.stack([values[name].double() for name in self.names])
        missing_FN = value_FN.isnan() & self._partly_F1
        self.sum_FG.index_add_(1, group_N, value_FN.masked_fill_(missing_FN, 0.0))
        self.known_FG.index_add_(1, group_N, (~missing_FN).double())
        self.rows_G.index_add_(0, group_N, torch.ones_like(value_FN[0]))

    def totals(self, fold_G: npt.NDArray[np.int64] | None = None, groups: int = 1) -> Totals:
        """The sums on the host, groups put together.

        Args:
            fold_G: the new group of each group, 0 to `groups` - 1; None: all in one.
            groups: how many there will be.
        """
        fold_G = np.zeros(len(self.rows_G), np.int64) if fold_G is None else fold_G

        def folded(x_G: torch.Tensor) -> FloatG:
            return np.bincount(fold_G, x_G.cpu().numpy(), groups).astype(np.float64, copy=False)

        return Totals(
            folded(self.rows_G),
            {n: folded(x_G) for n, x_G in zip(self.names, self.sum_FG)},
            {n: folded(x_G) for n, x_G in zip(self.names, self.known_FG)},
        )


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums by group, on the host.

    Attributes:
        rows_G: rows.
        sums: by figure, `[G]`.
        known: rows that could tell, by figure, `[G]`.
    """

    rows_G: FloatG
    sums: dict[str, FloatG]
    known: dict[str, FloatG]

    def figures(self, group: int) -> dict[str, Any]:
        """Means of one group, as fields of `Group` and `Evaluation`; without those of the teacher that a row could not tell."""
        rows = self.rows_G[group]
        found: dict[str, Any] = {"rows": int(rows)}
        for name, sum_G in self.sums.items():
            known = self.known[name][group]
            if name in ("confidence", "hit") or not known or (name != "lm_loss" and math.isnan(sum_G[group])):
                continue
            found[name] = float(sum_G[group] / known)
            if known < rows:
                found["top1_rows"] = int(known)
        return found


def reliability(totals: Totals) -> tuple[Bin, ...]:
    """The curve from sums by confidence."""
    bins = []
    for b, rows in enumerate(totals.rows_G):
        means = [float(totals.sums[name][b] / rows) if rows else None for name in ("confidence", "hit")]
        bins.append(Bin(b / BINS, (b + 1) / BINS, int(rows), *means))
    return tuple(bins)


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error: mean over rows of |mean confidence - hit rate| of their bin."""
    rows = sum(b.rows for b in bins)
    return sum(b.rows * abs((b.confidence or 0.0) - (b.hit_rate or 0.0)) for b in bins) / rows


def position_groups(sums: Sums) -> tuple[Group, ...]:
    """Groups from sums by position, those that have rows."""
    count = len(sums.rows_G)
    totals = sums.totals(np.arange(count), count)
    return tuple(
        Group(first=(1 << g) >> 1, last=(1 << g) - 1, **totals.figures(g)) for g in range(count) if totals.rows_G[g]
    )


def frequency_groups(sums: Sums, count_V: IntV) -> tuple[Group, ...]:
    """Groups from sums by label: tokens that are equally frequent stay together, each group has about a tenth of the rows.

    With c(f) the share of rows whose label occurs less than f times, plus half of those whose label occurs f times, a row is
    in group floor(10 c(f)). A group without rows is left out.

    Args:
        sums: by label.
        count_V: occurrences of each token.
    """
    rows_V = sums.rows_G.cpu().numpy()
    frequency_K, of_V = np.unique(count_V, return_inverse=True)
    rows_K = np.bincount(of_V, rows_V)
    middle_K = (rows_K.cumsum() - rows_K / 2) / rows_K.sum()
    group_K = np.minimum(np.floor(middle_K * DECILES), DECILES - 1).astype(np.int64)
    totals = sums.totals(group_K[of_V], DECILES)
    groups = []
    for g in np.flatnonzero(totals.rows_G):
        inside_K = frequency_K[(group_K == g) & (rows_K > 0)]
        groups.append(Group(first=int(inside_K[0]), last=int(inside_K[-1]), **totals.figures(int(g))))
    return tuple(groups)
