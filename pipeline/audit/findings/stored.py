"""What a record says about itself, no teacher needed: rules no sound row breaks, and estimates that must agree.

- weights of a row sum to 1; counts are whole numbers of N
- the label's log-probability, where the label is among the kept ids, is that id's
- entropy lies between what the kept probabilities allow: sum of -p log p from below; from above with the rest spread evenly
- sum of w (-log p) over a row estimates its entropy without bias, and the label's weight its probability

Shapes: `R` rows, `E` entries.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from stillroom.pipeline.audit.findings.test import Test, certain
from stillroom.pipeline.audit.nulls import bernstein
from stillroom.pipeline.audit.record import Record
from stillroom.storage.codes import ENTROPY_STEP, LABEL_LOGP_STEP, PIVOT, TAIL_NATS, logp_scale
from stillroom.storage.layout import TOP_KINDS
from stillroom.storage.manifest import Manifest
from stillroom.storage.spec import COUNT_KINDS

SUM_TOLERANCE: Final = 1e-4
ENTROPY_ALLOWANCE: Final = (
    0.05  # nats: rounding of entropies near 0 and of log-probabilities in the tail is not centred
)
FEWEST_ROWS: Final = 1000  # for a normal approximation


def stored(manifest: Manifest, record: Record) -> list[Test]:
    """All of them that the sampler and the columns of the cache allow."""
    if not record.rows:
        return []
    tests = [*_weights(manifest, record)]
    if np.isfinite(record.entropy_R).any():
        tests.append(_entropy_bounds(manifest, record))
    if np.isfinite(record.logp_E).any() and np.isfinite(record.label_logp_R).any():
        tests.append(_label_among_kept(manifest, record))
    if manifest.sampler.kind not in TOP_KINDS:
        tests += _entropy_estimate(record)
        if manifest.sampler.exponent == 1.0 and np.isfinite(record.label_logp_R).any():
            tests.append(_label_weight(manifest, record))
    return tests


def _weights(manifest: Manifest, record: Record) -> list[Test]:
    spec, sum_R = manifest.sampler, record.sums(record.weight_E)
    top = spec.kind in TOP_KINDS
    off_R = sum_R > 1 + 1e-3 if top else np.abs(sum_R - 1) > SUM_TOLERANCE
    tests = []
    if spec.exponent == 1.0:
        broken, mean = int(off_R.sum()), float(sum_R.mean())
        tests.append(Test(
            name="record.sums",
            what="rows whose weights sum to more than 1" if top else "rows whose weights do not sum to 1",
            statistic=broken,
            p=certain(broken),
            says=f"the weights of {broken:,} of {record.rows:,} rows do not sum to 1 (mean {mean:.4f})",
            consequence="mass is lost or doubled: gradients are scaled row by row, and the student is pulled off the teacher",
            remedy="find where weights were cut, scaled or rounded after drawing; keep them as they come",
            figures={"rows": record.rows, "mean": mean, "smallest": float(sum_R.min()), "largest": float(sum_R.max())},
        ))  # fmt: skip
    if spec.kind in COUNT_KINDS and spec.exponent == 1.0:
        count_E = record.weight_E * spec.draws
        broken = int((np.abs(count_E - np.rint(count_E)) > 1e-3).sum())
        tests.append(Test(
            name="record.counts",
            what=f"weights that are no whole number of 1/{spec.draws}",
            statistic=broken,
            p=certain(broken),
            says=f"{broken:,} of {len(count_E):,} weights are no counts out of {spec.draws}{_lattice(record.weight_E)}",
            consequence="rounded counts favour some ids over others: a bias that more rows do not cure",
            remedy=f"store counts out of {spec.draws} as they are (they fit a byte), and make the cache again",
        ))  # fmt: skip
    return tests


def _lattice(weight_E: npt.NDArray[np.float64]) -> str:
    for steps in (127, 128, 255, 256):
        if np.abs(weight_E * steps - np.rint(weight_E * steps)).max(initial=0.0) < 1e-3:
            return f"; all are multiples of 1/{steps}"
    return ""


def steps_of(manifest: Manifest, logp_E: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Largest rounding of stored log-probabilities, nats."""
    pivot = float(logp_scale(manifest.sampler.draws).pivot_logp)
    return np.where(logp_E >= pivot, -pivot / (255 - PIVOT), TAIL_NATS / (PIVOT - 1)) * 1.001


def _label_among_kept(manifest: Manifest, record: Record) -> Test:
    is_label_E = (record.id_E == record.label_R[record.row_E]) & np.isfinite(record.logp_E)
    lowest = float(logp_scale(manifest.sampler.draws).logp[0])
    label_E = np.maximum(record.label_logp_R[record.row_E], lowest)
    gap_E = np.abs(label_E - record.logp_E) - steps_of(manifest, record.logp_E) - LABEL_LOGP_STEP / 2
    asked = int(is_label_E.sum())
    broken = int((is_label_E & (gap_E > 1e-3)).sum())
    return Test(
        name="record.label_logp",
        what="rows whose label is kept with another log-probability than the label's own",
        statistic=broken,
        p=certain(broken),
        says=f"{broken:,} of {asked:,} labels among the kept ids have another log-probability there than as the label",
        consequence="targets, labels and their log-probabilities do not belong together: some of them are shifted",
        remedy="an audit with the teacher says whether labels or targets are shifted; make the cache again",
        figures={"labels_kept": asked},
    )


def _entropy_bounds(manifest: Manifest, record: Record) -> Test:
    has_E = np.isfinite(record.logp_E)
    logp_E = np.where(has_E, record.logp_E, 0.0)
    p_E = np.where(has_E, np.exp(logp_E), 0.0)
    slack_R = record.sums(p_E * np.where(has_E, steps_of(manifest, logp_E), 0.0) * (1 - logp_E))
    kept_R, many_R = record.sums(p_E), record.sums(has_E)
    rest_R = np.clip(1 - kept_R + slack_R, 1e-9, 1.0)
    lower_R = record.sums(-p_E * logp_E) - slack_R
    spread_R = rest_R * np.log(np.maximum(manifest.vocab_size - many_R, 1) / rest_R)
    upper_R = np.minimum(lower_R + 2 * slack_R + np.maximum(spread_R, 0.0), math.log(manifest.vocab_size))
    reach = ENTROPY_STEP / 2 + 1e-3
    # Kept probabilities that sum to more than 1 say nothing of the entropy.
    sane_R = kept_R <= 1 + slack_R + 1e-3
    broken_R = sane_R & ((record.entropy_R < lower_R - reach) | (record.entropy_R > upper_R + reach))
    broken = int(broken_R.sum())
    return Test(
        name="record.entropy",
        what="rows whose entropy can not be, given their kept probabilities and the vocabulary",
        statistic=broken,
        p=certain(broken),
        says=f"the entropy of {broken:,} of {record.rows:,} rows can not be: their kept probabilities leave no room for it",
        consequence="entropies are of other rows, another base or another vocabulary: selections and weights by entropy go wrong",
        remedy="check that entropy is taken in nats over the whole vocabulary of the same row, and make the cache again",
    )


def _entropy_estimate(record: Record) -> list[Test]:
    known_R = (record.sums(np.isnan(record.logp_E)) == 0) & np.isfinite(record.entropy_R)
    if known_R.sum() < FEWEST_ROWS:
        return []
    estimate_R = record.sums(-record.weight_E * np.nan_to_num(record.logp_E))
    gap_R = (estimate_R - record.entropy_R)[known_R]
    mean, error = float(gap_R.mean()), float(gap_R.std(ddof=1)) / math.sqrt(len(gap_R))
    z = max(0.0, abs(mean) - ENTROPY_ALLOWANCE) / max(error, 1e-12)
    return [Test(
        name="record.entropy_estimate",
        what="mean of sum w (-log p) less the entropy, nats",
        statistic=mean,
        p=min(1.0, 2 * math.exp(-min(z * z / 2, 700.0))),
        says=f"weights and log-probabilities put the entropy {mean:+.2f} nats from what is stored: weights are no unbiased "
        "estimate of those probabilities",
        consequence="the weights are not of the log-probabilities beside them: top-k posing as a sample, or a temperature",
        remedy="audit with the teacher, which tells which of them is wrong",
        figures={"mean": mean, "standard_error": error},
    )]  # fmt: skip


def _label_weight(manifest: Manifest, record: Record) -> Test:
    spec, draws = manifest.sampler, manifest.sampler.draws
    p_R = np.exp(record.label_logp_R)
    weight_R = record.sums(np.where(record.id_E == record.label_R[record.row_E], record.weight_E, 0.0))
    if spec.kind == "threshold":  # the head is exact: only labels in the tail are drawn
        share_R, largest_R = _tail(record, draws)
        asked_R = np.isfinite(p_R) & (p_R < 0.98 / draws) & (share_R > 0)
        variance_R, largest = p_R * np.maximum(share_R - p_R, 0.0), float(largest_R[asked_R].max(initial=0.0))
    else:
        asked_R, largest = np.isfinite(p_R), 1 / draws
        part_R = p_R * draws - np.floor(p_R * draws)
        variance_R = part_R * (1 - part_R) / draws**2 if spec.kind == "systematic" else p_R * (1 - p_R) / draws
    total = float((weight_R - p_R)[asked_R].sum())
    slack = float(p_R[asked_R].sum()) * LABEL_LOGP_STEP / 2
    variance = float(variance_R[asked_R].sum()) + (0.02 / draws) ** 2 * int(asked_R.sum())
    return Test(
        name="record.label_weight",
        what="mean weight of the label less its probability, over labels that are drawn",
        statistic=total / max(1, int(asked_R.sum())),
        p=bernstein(max(0.0, abs(total) - slack), variance, largest),
        says=f"labels have weight {float(weight_R[asked_R].sum()):.1f} in {int(asked_R.sum()):,} rows, their probabilities say "
        f"{float(p_R[asked_R].sum()):.1f}",
        consequence="weights are no unbiased estimate of the probabilities beside them, or lie on other rows",
        remedy="audit with the teacher, which tells which of them is wrong",
        figures={"rows": int(asked_R.sum())},
    )


def _tail(record: Record, draws: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Weight of one tail entry of each row, 0 where there is no tail, twice: as a share and as the largest."""
    pivot = float(logp_scale(draws).pivot_logp)
    tail_E = np.isnan(record.logp_E) | (record.logp_E < pivot)
    many_R = record.sums(tail_E)
    share_R = record.sums(np.where(tail_E, record.weight_E, 0.0)) / np.maximum(many_R, 1)
    return share_R, share_R + 1e-6
