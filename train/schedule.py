"""Numbers that change over a run: shares, temperatures, interpolations. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stillroom.train.config import ScheduleName


@dataclass(frozen=True, slots=True)
class Schedule:
    """A number at every step of a run, from `start` at the first to `end` at the last: a pure function of the step.

    Attributes:
        start, end: its ends.
        shape: `constant` (start throughout), `linear`, `cosine`, or `wsd`: start, then linear over the last `decay` of the steps.
        steps: optimizer steps of the run.
        decay: share of the steps over which `wsd` moves.
    """

    start: float
    end: float
    shape: ScheduleName = "linear"
    steps: int = 1
    decay: float = 0.5

    @classmethod
    def constant(cls, value: float) -> Schedule:
        """The same number throughout."""
        return cls(value, value, "constant")

    @property
    def values(self) -> tuple[float, float]:
        """The ends it really reaches."""
        return self.start, self.start if self.shape == "constant" else self.end

    def at(self, step: int) -> float:
        """The number of step `step`, counted from 0."""
        if self.shape == "constant" or self.start == self.end:
            return self.start
        last = max(1, self.steps - 1)
        progress = min(1.0, step / last)
        if self.shape == "cosine":
            progress = 0.5 * (1.0 - math.cos(math.pi * progress))
        elif self.shape == "wsd":
            progress = max(0.0, 1.0 - (1.0 - progress) / self.decay)
        return self.start + (self.end - self.start) * progress
