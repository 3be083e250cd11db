"""Is this the teacher: stored label log-probability, log-probabilities of entries and entropy against the recomputation.

What is stored is rounded, by at most a known step, and a teacher computed on another machine or in another batch differs in its
last bits. The control run says by how much: rows whose stored figure lies further from the recomputation than its step and
`ALLOWANCE` times the largest deviation of any control row are counted. Were the stored teacher one more run like the control,
the largest deviations would fall on either alike (`nulls.most_deviant`).

Shapes: `R` rows, `E` entries, `S` shards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from stillroom.pipeline.audit.facts import Facts
from stillroom.pipeline.audit.findings.test import Test
from stillroom.pipeline.audit.nulls import more_deviant, most_deviant
from stillroom.storage.codes import (
    ENTROPY_STEP,
    LABEL_LOGP_STEP,
    PIVOT,
    TAIL_NATS,
    decode_label_logp,
    encode_label_logp,
    logp_scale,
)
from stillroom.storage.manifest import Manifest

ALLOWANCE: Final = 2.0  # another machine's noise against the control's
HEAD_NATS: Final = -4.0  # log-probabilities above it are stored finely
FEWEST_ENTRIES: Final = 100
FLOOR_NATS: Final = 1e-4  # float32 logits of another machine or library move log-probabilities by less
_CONSEQUENCE: Final = (
    "the cache holds another distribution than this teacher's: students learn from a teacher you did not mean"
)
_REMEDY: Final = (
    "check teacher, revision, adapter, dtype and vocab_size in the manifest against what is loaded here; if they are right, "
    "make the cache (or the shards named) again"
)

FloatR = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far rows lie from the recomputation in one figure.

    Attributes:
        name, what: of the figure.
        excess_R: distance beyond what rounding explains, nats; NaN where the cache keeps none.
        control_R: the control run's distance.
    """

    name: str
    what: str
    excess_R: FloatR
    control_R: FloatR

    @property
    def limit(self) -> float:
        """Distance that noise explains, nats."""
        return max(FLOOR_NATS, ALLOWANCE * float(np.nanmax(self.control_R, initial=0.0)))

    @property
    def above_R(self) -> npt.NDArray[np.bool_]:
        """Rows beyond it."""
        return np.nan_to_num(self.excess_R, nan=0.0) > self.limit


def deviations(manifest: Manifest, facts: Facts) -> list[Deviation]:
    """The three figures, as far as the cache keeps them."""
    found = []
    if np.isfinite(facts.stored_label_R).any():
        gap_R = np.abs(facts.stored_label_R - facts.label_R) - LABEL_LOGP_STEP / 2
        found.append(Deviation("label", "label log-probability", gap_R, np.abs(facts.control_label_R - facts.label_R)))
    if np.isfinite(facts.stored_E).any():
        found.append(_of_entries(manifest, facts))
    if np.isfinite(facts.stored_entropy_R).any():
        gap_R = np.abs(facts.stored_entropy_R - facts.entropy_R) - ENTROPY_STEP / 2
        found.append(Deviation("entropy", "entropy", gap_R, np.abs(facts.control_entropy_R - facts.entropy_R)))
    return found


def drift(manifest: Manifest, facts: Facts) -> list[Test]:
    """Tests over all rows."""
    tests = []
    for figure in deviations(manifest, facts):
        above, many = int(figure.above_R.sum()), int(np.isfinite(figure.excess_R).sum())
        worst = float(np.nanmax(figure.excess_R, initial=0.0))
        tests.append(Test(
            name=f"drift.{figure.name}",
            what=f"rows whose {figure.what} is further off than rounding and noise explain",
            statistic=above,
            p=most_deviant(above, many, many),
            says=f"the {figure.what} of {above:,} of {many:,} rows is not this teacher's (off by up to {worst:.3g} nats beyond "
            f"rounding; noise explains {figure.limit:.2g})" + _looks_like(facts),
            consequence=_CONSEQUENCE,
            remedy=_REMEDY,
            figures={"rows": many, "above": above, "limit_nats": figure.limit, "largest_nats": worst,
                     "control_largest_nats": float(np.nanmax(figure.control_R, initial=0.0))},
        ))  # fmt: skip
    return tests + _scale(facts)


def _scale(facts: Facts) -> list[Test]:
    """Deviations that are each within noise, but larger than the control's in most rows."""
    has_R = np.isfinite(facts.stored_label_R) & np.isfinite(facts.control_label_R)
    if not has_R.any():
        return []
    stored_R = np.abs(facts.stored_label_R - facts.label_R)[has_R]
    rounded_R = decode_label_logp(encode_label_logp(facts.control_label_R[has_R].astype(np.float32)))
    control_R = np.abs(rounded_R - facts.label_R[has_R])
    wins = int((stored_R > ALLOWANCE * control_R + FLOOR_NATS).sum())
    mean, noise = float(stored_R.mean()), float(control_R.mean())
    return [Test(
        name="drift.scale",
        what=f"rows whose label log-probability is off by more than {ALLOWANCE:g} times the control run's",
        statistic=wins,
        p=more_deviant(wins, len(stored_R)),
        says=f"label log-probabilities are off by {mean:.3g} nats on average, the control run's by {noise:.3g}",
        consequence=_CONSEQUENCE,
        remedy=_REMEDY,
        figures={"rows": len(stored_R), "wins": wins, "mean_nats": mean, "control_mean_nats": noise},
    )]  # fmt: skip


def by_group(manifest: Manifest, facts: Facts, group_R: npt.NDArray[np.int64], names: Mapping[int, str]) -> list[Test]:
    """The same for the rows of each shard, or of each writer: a fault that only some of them have.

    Args:
        manifest: of the cache.
        facts: all rows.
        group_R: number of each row's group.
        names: `family.detail` of each group, "shard.label[3]" without the figure: `shard` and `[3]` come as "shard|[3]".
    """
    tests = []
    if len(names) < 2:
        return []
    for figure in deviations(manifest, facts):
        many = int(np.isfinite(figure.excess_R).sum())
        for group, name in names.items():
            inside_R = (group_R == group) & np.isfinite(figure.excess_R)
            rows, above = int(inside_R.sum()), int((figure.above_R & inside_R).sum())
            if not rows:
                continue
            family, place = name.split("|")
            tests.append(Test(
                name=f"{family}.{figure.name}{place}",
                what=f"rows of {family} {place.strip('[]')} whose {figure.what} is further off than rounding and noise explain",
                statistic=above,
                p=most_deviant(above, rows, many),
                says=f"{above:,} of {rows:,} rows of {family} {place.strip('[]')} have another {figure.what} than this teacher",
                consequence="part of the cache was written with another teacher, dtype or library than the rest",
                remedy=f"make {family} {place.strip('[]')} again: drop it with `stillroom verify --repair` or delete its record, "
                "and run `stillroom cache`",
                figures={"rows": rows, "above": above, "limit_nats": figure.limit},
            ))  # fmt: skip
    return tests


def _of_entries(manifest: Manifest, facts: Facts) -> Deviation:
    scale = logp_scale(manifest.sampler.draws)
    lowest, pivot = float(scale.logp[0]), float(scale.pivot_logp)
    head_step, tail_step = -pivot / (255 - PIVOT), TAIL_NATS / (PIVOT - 1)
    step_E = np.where(facts.stored_E >= pivot, head_step, tail_step)
    excess_E = np.abs(facts.stored_E - np.maximum(facts.logp_E, lowest)) - step_E * 1.001
    noise_E = np.where(np.isnan(facts.stored_E), np.nan, np.abs(facts.control_E - facts.logp_E))
    return Deviation("head", "log-probability of kept ids", _row_max(facts, excess_E), _row_max(facts, noise_E))


def _row_max(facts: Facts, value_E: npt.NDArray[np.float64]) -> FloatR:
    """Largest of each row; NaN where it has none."""
    result = np.full(facts.rows, -np.inf)
    has_E = np.isfinite(value_E)
    np.maximum.at(result, facts.row_E[has_E], value_E[has_E])
    return np.where(np.isfinite(result), result, np.nan)


@dataclass(frozen=True, slots=True)
class Fit:
    """The temperature at which the recomputed teacher comes nearest to the stored log-probabilities of the head.

    Attributes:
        temperature: from a regression within rows.
        deviation: root mean square of stored less recomputed, row means taken out, nats.
        explained: share of its square that the temperature takes away.
    """

    temperature: float
    deviation: float
    explained: float


def fit_of(facts: Facts) -> Fit | None:
    """The fit, or None where too few log-probabilities are kept."""
    has_E = facts.stored_E > HEAD_NATS  # False for NaN
    row_E = facts.row_E[has_E]
    if len(row_E) < FEWEST_ENTRIES:
        return None
    many_R = np.maximum(np.bincount(row_E, minlength=facts.rows), 1)

    def centred(value_E: FloatR) -> FloatR:
        result: FloatR = value_E - (np.bincount(row_E, value_E, facts.rows) / many_R)[row_E]
        return result

    true_E, stored_E = centred(facts.logp_E[has_E]), centred(facts.stored_E[has_E])
    square, product = float((true_E**2).sum()), float((true_E * stored_E).sum())
    if square <= 0 or product <= 0:
        return None
    before = float(((stored_E - true_E) ** 2).sum())
    after = float(((stored_E - true_E * product / square) ** 2).sum())
    return Fit(square / product, math.sqrt(before / len(row_E)), 1 - after / before if before > 0 else 0.0)


def _looks_like(facts: Facts) -> str:
    fit = fit_of(facts)
    if fit is None or fit.explained < 0.5 or math.isclose(fit.temperature, 1.0, abs_tol=0.01):
        return ""
    return f"; they look like temperature {fit.temperature:.2f}"
