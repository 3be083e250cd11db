"""From values to places on an axis, and where its ticks go.

Lengths are pixels of the drawing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

STEPS: Final = (1.0, 2.0, 2.5, 5.0, 10.0)
MINUS: Final = "\u2212"  # as wide as a plus, which a hyphen is not
UNITS: Final = ((1e9, 1e9, " G"), (1e6, 1e6, " M"), (1e5, 1e3, " k"))  # from which value on, size, letter
PADDING: Final = 0.05  # of the range, left free at either end
SUPERSCRIPT: Final = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis shows.

    Attributes:
        label: what it measures, with its unit.
        log: logarithmic.
        low, high: ends, where they are not to come from the data.
    """

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None

    def scale(self, values: Iterable[float], start: float, stop: float) -> Scale:
        """The scale that holds all `values` between pixels `start` and `stop`.

        Raises:
            ValueError: no value, one that is not finite, or on a logarithmic axis one that is not above 0.
        """
        all_values = [*values, *(end for end in (self.low, self.high) if end is not None)]
        if not all_values:
            raise ValueError(f"axis {self.label!r} has nothing to show: give it values")
        for value in all_values:
            if not math.isfinite(value) or (self.log and value <= 0):
                raise ValueError(f"axis {self.label!r} can not show {value}: leave such points out")
        low, high = min(all_values), max(all_values)
        if self.log:
            low, high = math.log10(low), math.log10(high)
        room = (high - low) * PADDING or (0.5 if self.log else max(abs(high) * 0.1, 1e-12))
        given_low, given_high = (None if v is None else math.log10(v) if self.log else v for v in (self.low, self.high))
        return Scale(
            low - room if given_low is None else given_low,
            high + room if given_high is None else given_high,
            self.log,
            start,
            stop,
        )


@dataclass(frozen=True, slots=True)
class Scale:
    """An axis with ends: `low` and `high` (of a logarithmic one their logarithms to base 10) lie at `start` and `stop`."""

    low: float
    high: float
    log: bool
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """Pixel of a value."""
        place = math.log10(value) if self.log else value
        return self.start + (place - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self, wanted: int) -> list[tuple[float, str]]:
        """About `wanted` round values between the ends, and what stands beside them."""
        if not self.log:
            return linear_ticks(self.low, self.high, wanted)
        found = log_ticks(self.low, self.high, wanted)
        return found if len(found) >= 3 else linear_ticks(10**self.low, 10**self.high, wanted)


def linear_ticks(low: float, high: float, wanted: int) -> list[tuple[float, str]]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten, about `wanted` of them, and their labels."""
    rough = (high - low) / max(1, wanted)
    power = math.floor(math.log10(rough))
    factor = min(STEPS, key=lambda step: abs(math.log(step * 10.0**power / rough)))
    step = factor * 10.0**power
    slack = 1e-9 * (high - low)
    first, last = math.ceil((low - slack) / step), math.floor((high + slack) / step)
    values = [round(count * step, 12 - power) + 0.0 for count in range(first, last + 1)]
    largest = max((abs(value) for value in values), default=0.0)
    size, unit = next(((size, unit) for least, size, unit in UNITS if largest >= least), (1.0, ""))
    digits = _digits(step / size)
    return [
        (value, f"{value / size:,.{digits}f}{unit}".replace("-", MINUS) if value else f"{0:.{digits}f}")
        for value in values
    ]


def _digits(step: float) -> int:
    """Decimals that multiples of `step` need."""
    return next((digits for digits in range(15) if abs(round(step, digits) - step) < 1e-9 * step), 15)


def log_ticks(low: float, high: float, wanted: int) -> list[tuple[float, str]]:
    """Powers of ten between 10**low and 10**high, thinned or with 2 and 5 between them so that there are about `wanted`."""
    first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
    if last - first + 1 > wanted:
        stride = math.ceil((last - first + 1) / wanted)
        return [(10.0**power, log_label(1, power)) for power in range(first, last + 1) if power % stride == 0]
    between = (1, 2, 5) if high - low <= wanted / 3 else (1, 3) if high - low <= wanted / 2 else (1,)
    return [
        (factor * 10.0**power, log_label(factor, power))
        for power in range(first - 1, last + 1)
        for factor in between
        if low - 1e-9 <= math.log10(factor) + power <= high + 1e-9
    ]


def log_label(factor: int, power: int) -> str:
    """`factor` times ten to the `power`, in digits where few are enough."""
    if -3 <= power <= 4:
        return f"{factor * 10**power:,}" if power >= 0 else f"{factor * 10.0**power:.{-power}f}"
    sign = f"10{str(power).translate(SUPERSCRIPT)}"
    return sign if factor == 1 else f"{factor}\u00d7{sign}"
