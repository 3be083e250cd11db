"""`Selection`: which sequences an order reads, how often, and which of them a curriculum lets in when.

The order (`stream`) runs in rounds. The first `STAGES` rounds are a curriculum's, if there is one; every later round is an
epoch: as many positions as the weights sum to. In a round every sequence stands a whole number of times, its weight
rounded up or down: the weights lie end to end on a line, in an order keyed by the seed, and a sequence stands once for
every point k - u that falls into its stretch (systematic sampling, Madow 1949, recalled). So the number of positions is
the same whatever u is, a weight of 1 is just one visit, and over u the expected number of visits is the weight. u moves on
by the golden ratio from round to round, which spreads the visits of a sequence as evenly over the epochs as can be.

Shapes: `S` sequences.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final, NamedTuple, final

import numpy as np
import numpy.typing as npt

from stillroom.storage.errors import InputError
from stillroom.storage.order import permute, shuffle

STAGES: Final = 16  # of a curriculum: its share grows in so many steps
_BITS: Final = 24  # of a visit: weights count in multiples of 2**-24
_GOLDEN: Final = 10368889  # 2**24 / golden ratio, to the nearest odd number
_ROUNDING: Final = (1 << 63) + 1  # `part` of the permutation that weights are rounded along


@final
@dataclass(frozen=True, eq=False)
class Selection:
    """Weights of sequences, and a curriculum.

    Attributes:
        weight_S: how often each sequence is to be read in an epoch, on average; 0: never. They are scaled so that an epoch has
            a whole number of positions.
        difficulty_S: None, or what a curriculum sorts the sequences by, easy ones first; NaN is hardest.
        start: share of the sequences with a weight that take part at the beginning of a curriculum: the easiest.
        ramp: positions over which the share grows from `start` to 1, in `STAGES` even steps.

    Raises:
        InputError: nothing is selected, a weight is negative or no number, or settings that do not fit.
    """

    weight_S: npt.NDArray[np.float64]
    difficulty_S: npt.NDArray[np.float64] | None = None
    start: float = 1.0
    ramp: int = 0

    def __post_init__(self) -> None:
        if self.weight_S.ndim != 1 or not np.all(np.isfinite(self.weight_S) & (self.weight_S >= 0)):
            raise InputError(
                "weights of sequences came with a negative one, an infinity or NaN: wanted numbers from 0 up"
            )
        if self.size < 1:
            raise InputError(
                f"nothing is selected: the weights of {len(self.weight_S)} sequences sum to {self.weight_S.sum():g} visits an "
                "epoch, wanted at least one"
            )
        if self.difficulty_S is None:
            if self.ramp or self.start != 1.0:
                raise InputError(
                    "a curriculum needs the difficulty of the sequences: give it, or leave start and ramp out"
                )
        elif len(self.difficulty_S) != len(self.weight_S):
            raise InputError(
                f"difficulties came for {len(self.difficulty_S)} sequences, weights for {len(self.weight_S)}"
            )
        if not 0.0 < self.start <= 1.0 or self.ramp < 0:
            raise InputError(
                f"a curriculum came with start {self.start} and ramp {self.ramp}, wanted 0 < start <= 1, ramp >= 0"
            )

    @property
    def size(self) -> int:
        """Positions of an epoch."""
        return int(np.rint(self.weight_S.sum()))

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides the order."""
        hasher = hashlib.sha256(f"{len(self.weight_S)} {self.start!r} {self.ramp}\n".encode())
        for values in (self.weight_S, self.difficulty_S):
            hasher.update(b"none" if values is None else values.astype("<f8").data)
        return hasher.hexdigest()


class Round(NamedTuple):
    """A round of an order: its number, the position it starts at, and how many it has."""

    number: int
    start: int
    size: int


@final
class Visits:
    """The rounds of a selection: a pure function of (selection, seed).

    Args:
        selection: weights and curriculum.
        seed: key of the rounding.
    """

    def __init__(self, selection: Selection, seed: int) -> None:
        self._selection: Final = selection
        self._along_S: Final = shuffle(len(selection.weight_S), seed=seed, epoch=0, part=_ROUNDING)
        self._first: Final = int(permute(np.zeros(1, np.int64), size=1 << _BITS, seed=seed, epoch=0, part=_ROUNDING)[0])
        self.size: Final = selection.size
        stages = 0 if selection.difficulty_S is None else min(STAGES, selection.ramp)
        edges = np.linspace(0, selection.ramp, stages + 1).astype(np.int64) if stages else np.zeros(1, np.int64)
        self._edges: Final[list[int]] = edges.tolist()
        chosen_S = np.flatnonzero(selection.weight_S)
        self._rank_S: Final = np.zeros(0, np.int64) if not stages else np.full(len(selection.weight_S), -1)
        if stages:
            assert selection.difficulty_S is not None
            by_difficulty = chosen_S[np.argsort(selection.difficulty_S[chosen_S], kind="stable")]
            self._rank_S[by_difficulty] = np.arange(len(chosen_S))
        self._chosen: Final = len(chosen_S)

    @property
    def stages(self) -> int:
        """Rounds of the curriculum."""
        return len(self._edges) - 1

    def round(self, number: int) -> Round:
        """Round `number`."""
        if number < self.stages:
            return Round(number, self._edges[number], self._edges[number + 1] - self._edges[number])
        return Round(number, self._edges[-1] + (number - self.stages) * self.size, self.size)

    def round_at(self, position: int) -> Round:
        """The round that holds a position."""
        if position < self._edges[-1]:
            return self.round(int(np.searchsorted(self._edges, position, side="right")) - 1)
        return self.round(self.stages + (position - self._edges[-1]) // self.size)

    def share(self, number: int) -> float:
        """Share of the selected sequences that take part in a round."""
        if number >= self.stages:
            return 1.0
        return self._selection.start + (1.0 - self._selection.start) * number / self.stages

    def of(self, number: int) -> npt.NDArray[np.int64]:
        """How often each sequence stands in round `number`, `[S]`; they sum to the size of the round."""
        weight_S, total = self._selection.weight_S, self.round(number).size
        if number < self.stages:
            many = max(1, int(np.ceil(self.share(number) * self._chosen)))
            weight_S = np.where(self._rank_S < many, weight_S, 0.0)
        end_S = np.cumsum(weight_S[self._along_S])
        unit_S = np.rint(end_S * (total / end_S[-1]) * (1 << _BITS)).astype(np.int64)
        unit_S[end_S == end_S[-1]] = total << _BITS  # whatever the last digit of the product was
        shift = (self._first + number * _GOLDEN) % (1 << _BITS)
        visit_S = np.empty(len(unit_S), np.int64)
        visit_S[self._along_S] = np.diff((unit_S + shift) >> _BITS, prepend=0)
        return visit_S
