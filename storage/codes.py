"""The 8-bit codes a cache stores instead of float probabilities, and their exact inverses.

Shapes: `R` rows, `E` entries (any CSR run of them), `C` codes.

**Log-p code.** 256 levels with the pivot 1/N, N = draws. Codes 64..255 are spaced evenly in log p over [1/N, 1]; codes
0..63 evenly over the `TAIL_NATS` nats below 1/N (code 63 is 1/N as seen from below, so that an entry keeps its side of
the pivot). Rounding is stochastic in the *linear* domain, E[p_hat] = p, and systematic along the row in order of
descending p, from one uniform number u per row: with f_i the chance that entry i is rounded up, entry i goes up where
floor(f_1 + ... + f_i + u) steps. Hence the number of ups in any run of neighbours differs from its expectation by less
than 1.

**Weights of a threshold row** are multiples of 2**-24, so that float32 sums of them are exact in any order. Every head
entry but the first takes its code's level; the tail mass tau has a code of its own on a square-root scale,
tau = (c/C)**2, which spreads the noise evenly in the Fisher metric; the m tail entries share its units, the left-over
ones going one each to the first; the first head entry takes what is left of 1.

**What is left is never negative.** Let p_1 >= p_2 >= ... be the head, s(p) the gap between the two levels around p. s
grows with p. The error of the others is sum_{i>=2} s(p_i) (up_i - f_i); its prefix sums of (up_i - f_i) stay below 1 and
s(p_i) does not increase with i, so by Abel summation the error is below s(p_2) <= s(p_1) <= (r - 1) p_1 plus one unit,
where r = N**(1/191) <= 1.0445 is the ratio of two levels for N <= 4096. The tail's code is high by at most
((c+1)**2 - c**2) / C**2 < 2/C. So the first entry keeps at least (2 - r)/N - 2/C - 2 units, and C is chosen
so that C >= 2.25 N (255, else 65535): 0.955 * 2.25 = 2.149 > 2 leaves a positive rest for every N from 2 to 4096. (N = 1
has no head but p = 1.) `tests/storage/test_codes.py` walks every N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

UNIT: Final = 1 << 24  # weights of a threshold row are multiples of 1 / UNIT
PIVOT: Final = 64  # the first head code
TAIL_NATS: Final = 18.0
LABEL_LOGP_STEP: Final = 1 / 128  # nats
ENTROPY_STEP: Final = 1 / 15  # nats; 254 steps reach 16.9, above the log of the largest vocabulary (2**24)
_ONE: Final = 1 << 32  # fixed point of the rounding chances, so that their running sums are exact

FloatE = npt.NDArray[np.float64]
IntE = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LogpScale:
    """Levels of the log-p code for one N.

    Attributes:
        logp: `[256]` float32, nats.
        p: `[256]` float64, ascending from 0 to 63 and from 64 to 255 (63 and 64 are both 1/N).
        head_units: `[192]` int64, the levels 64..255 in multiples of 1/UNIT.
        pivot_logp: float32(-ln N): entries at or above it are the head.
    """

    logp: npt.NDArray[np.float32]
    p: npt.NDArray[np.float64]
    head_units: npt.NDArray[np.int64]
    pivot_logp: np.float32


@lru_cache(maxsize=16)
def logp_scale(draws: int) -> LogpScale:
    """The log-p code for N = `draws`."""
    pivot = -math.log(draws)
    head = [pivot * (255 - code) / 191 for code in range(PIVOT, 256)]
    tail = [pivot - (PIVOT - 1 - code) * TAIL_NATS / (PIVOT - 1) for code in range(PIVOT)]
    units = np.array([math.floor(math.exp(x) * UNIT + 0.5) for x in head], np.int64)
    units[0], units[-1] = UNIT // draws, UNIT  # the pivot from below: no head entry falls under the first level
    logp = np.array(tail + head, np.float32)
    logp[PIVOT] = pivot_logp = np.float32(pivot)
    logp[PIVOT - 1] = np.nextafter(pivot_logp, np.float32(-np.inf))
    p = np.concatenate([[math.exp(x) for x in tail], units / UNIT])
    for table in (logp, p, units):
        table.flags.writeable = False
    return LogpScale(logp=logp, p=p, head_units=units, pivot_logp=pivot_logp)


def tail_code_max(draws: int) -> int:
    """C, the highest code of the tail mass: 255 where 2.25 N fits in it, else 65535 (see the module's argument)."""
    return 255 if 2.25 * draws <= 255 else 65535


@lru_cache(maxsize=16)
def tail_units(draws: int) -> npt.NDArray[np.int64]:
    """Tail mass of every code, `[C+1]` int64 in multiples of 1/UNIT: (c/C)**2, to the nearest unit."""
    top = tail_code_max(draws)
    code = np.arange(top + 1, dtype=np.int64)
    units = (code * code * (2 * UNIT) + top * top) // (2 * top * top)
    units.flags.writeable = False
    return units


def round_systematic(value_E: FloatE, levels_C: FloatE, row_start_E: IntE, uniform_E: FloatE) -> IntE:
    """Index into `levels_C` of every value: one of its two neighbours, right in expectation, systematic along a row.

    Args:
        value_E: values to round, clamped to the range of the levels; rows back to back.
        levels_C: ascending.
        row_start_E: index of the first entry of the entry's row.
        uniform_E: the row's uniform number in [0, 1), repeated for its entries.
    """
    if not len(value_E):
        return np.zeros(0, np.int64)
    low_E = np.clip(np.searchsorted(levels_C, value_E, side="right") - 1, 0, len(levels_C) - 2)
    gap_E = levels_C[low_E + 1] - levels_C[low_E]
    chance_E = np.divide(value_E - levels_C[low_E], gap_E, out=np.zeros_like(value_E), where=gap_E > 0)
    fixed_E = (np.clip(chance_E, 0.0, 1.0) * _ONE).astype(np.int64)
    before_E = np.cumsum(fixed_E) - fixed_E
    before_E += (uniform_E * _ONE).astype(np.int64) - before_E[row_start_E]
    up_E: IntE = ((before_E + fixed_E) >> 32) - (before_E >> 32)
    return low_E.astype(np.int64) + up_E


def encode_tail_mass(tau_R: FloatE, draws: int, uniform_R: FloatE) -> IntE:
    """Code of the tail mass of every row, stochastically rounded: `E[tail_units[code]] = tau * UNIT`."""
    levels = tail_units(draws)
    tau_R = np.clip(tau_R * UNIT, 0.0, float(UNIT))
    low_R = np.minimum(np.searchsorted(levels, tau_R, side="right") - 1, len(levels) - 2)
    chance_R = (tau_R - levels[low_R]) / (levels[low_R + 1] - levels[low_R])
    up_R: IntE = (uniform_R < chance_R).astype(np.int64)
    return low_R.astype(np.int64) + up_R


def encode_label_logp(logp_R: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """-logp in steps of `LABEL_LOGP_STEP`, to the nearest; 65535 stands for NaN (a row with no label)."""
    steps_R = np.clip(np.rint(-logp_R.astype(np.float64) / LABEL_LOGP_STEP), 0, 65534)
    return np.where(np.isnan(steps_R), 65535, steps_R).astype(np.uint16)


def decode_label_logp(code_R: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Inverse of `encode_label_logp`, float32 nats."""
    logp_R = code_R.astype(np.float32)
    logp_R *= np.float32(-LABEL_LOGP_STEP)
    missing_R = code_R == 65535
    if missing_R.any():
        logp_R[missing_R] = np.nan
    return logp_R


def encode_entropy(entropy_R: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Entropy in steps of `ENTROPY_STEP`, to the nearest, at most 254 of them; 255 stands for NaN."""
    steps_R = np.clip(np.rint(entropy_R.astype(np.float64) / ENTROPY_STEP), 0, 254)
    return np.where(np.isnan(steps_R), 255, steps_R).astype(np.uint8)


_ENTROPY = np.append(np.arange(255) * ENTROPY_STEP, np.nan).astype(np.float32)


def decode_entropy(code_R: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Inverse of `encode_entropy`, float32 nats."""
    return _ENTROPY[code_R]
