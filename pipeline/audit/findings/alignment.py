"""Do the targets belong to the rows they lie on: likelihood ratios of the kept ids under what else they could be.

If the weights w of a row estimate the teacher's p without bias, then for any other distribution q the ratio
sum w q(id) / p(id) has mean at most 1, whatever q: it is an e-value, and so is its product over rows, since draws are independent
given the teacher. Where q is what the rows really are, the product is astronomical. q is: the teacher some rows on; the teacher
without document borders; the teacher at another temperature; the teacher with ids cut to 16 or 17 bits; the frequency of
tokens in the text (a row from anywhere else, one in a hundred or ten).

Shapes: `R` rows, `E` entries, `A` alignments, `T` temperatures, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from stillroom.pipeline.audit.facts import ALIGNMENTS, ID_BITS, TEMPERATURES, Facts
from stillroom.pipeline.audit.findings.drift import FLOOR_NATS, fit_of
from stillroom.pipeline.audit.findings.test import Test
from stillroom.pipeline.audit.nulls import e_value, more_deviant
from stillroom.storage.codes import LABEL_LOGP_STEP

MIXTURES: Final = (0.01, 0.1)  # shares of rows from elsewhere that are thought of
CLIP: Final = 30.0
AGREEING_NATS: Final = 0.03  # rounding of stored log-probabilities and a 16-bit teacher's noise

FloatR = npt.NDArray[np.float64]
FloatE = npt.NDArray[np.float64]


def alignment(facts: Facts, unigram_V: FloatR) -> list[Test]:
    """All of them.

    Args:
        facts: of the rows.
        unigram_V: frequencies of ids in the text, positive, sum 1.
    """
    tests = [_shifted(facts, column, ahead) for column, ahead in enumerate(ALIGNMENTS)]
    tests += _labels(facts)
    if np.isfinite(facts.apart_E).any():
        tests.append(_attention(facts))
    tests += [_wrapped(facts, column, bits) for column, bits in enumerate(ID_BITS)
              if not np.isnan(facts.wrapped_EW[:, column]).all()]  # fmt: skip
    return [*tests, _temperature(facts), _elsewhere(facts, unigram_V)]


def ratios(facts: Facts, other_E: FloatE) -> FloatR:
    """sum w q / p of each row; 1 where q is not known of an entry."""
    unknown_R = facts.sums(np.isnan(other_E)) > 0
    power_E = np.where(np.isnan(other_E), 0.0, np.clip(other_E - facts.logp_E, -700.0, CLIP))
    return np.where(unknown_R, 1.0, facts.sums(facts.weight_E * np.exp(power_E)))


def _shifted(facts: Facts, column: int, ahead: int) -> Test:
    log, p = e_value(ratios(facts, facts.shift_EA[:, column]))
    return Test(
        name=f"alignment.targets[{ahead:+d}]",
        what=f"log of the likelihood ratio: targets are those of {ahead:+d} rows on",
        statistic=log,
        p=p,
        says=f"the targets lie {abs(ahead)} row{'s' if abs(ahead) > 1 else ''} {'late' if ahead < 0 else 'early'}: "
        f"the kept ids fit the teacher {ahead:+d} rows on by a likelihood ratio of e^{log:.0f}",
        consequence="every target teaches the next token of another context: the student learns nothing but the marginal",
        remedy="the writer shifted labels or targets once too often: fix it and make the cache again",
    )


def _labels(facts: Facts) -> list[Test]:
    """Stored label log-probabilities that fit another token, or another row, and not their own."""
    if not np.isfinite(facts.stored_label_R).any():
        return []
    reach = LABEL_LOGP_STEP / 2 + max(
        FLOOR_NATS, 2 * float(np.nanmax(np.abs(facts.control_label_R - facts.label_R), initial=0.0))
    )
    own_R = np.abs(facts.stored_label_R - facts.label_R) <= reach
    tests = []
    place = np.arange(facts.rows)
    for column, ahead in enumerate(ALIGNMENTS):
        other = np.clip(place + ahead, 0, facts.rows - 1)
        same_R = (facts.sequence_R[other] == facts.sequence_R) & (facts.row_R[other] == facts.row_R + ahead)
        there_R = np.where(same_R, facts.label_R[other], np.nan)
        for kind, value_R in (("label", facts.label_shift_RA[:, column]), ("label_row", there_R)):
            fits_R = np.abs(facts.stored_label_R - value_R) <= reach  # False for NaN
            wins, losses = int((fits_R & ~own_R).sum()), int((own_R & ~fits_R & np.isfinite(value_R)).sum())
            what = f"token {ahead:+d}" if kind == "label" else f"row {ahead:+d}"
            tests.append(Test(
                name=f"alignment.{kind}[{ahead:+d}]",
                what=f"rows whose label log-probability fits {what} and not its own",
                statistic=wins,
                p=more_deviant(wins, wins + losses),
                says=f"label log-probabilities are those of {what}: {wins:,} rows fit there alone, {losses:,} where they are",
                consequence="difficulty, ATKD's split and every reported loss are of other tokens",
                remedy="the writer took another token as the label: fix it and make the cache again",
                figures={"fit_there": wins, "fit_here": losses},
            ))  # fmt: skip
    return tests


def _attention(facts: Facts) -> Test:
    log, p = e_value(ratios(facts, facts.apart_E))
    return Test(
        name="attention.documents",
        what="log of the likelihood ratio: the teacher read across the borders of documents",
        statistic=log,
        p=p,
        says=f"the manifest says packing documents, but the kept ids fit a teacher that read across their borders (e^{log:.0f})",
        consequence="targets depend on unrelated text in front of a document, which the student does not see",
        remedy="the writer's attention did not reset: make the cache again with --attn-implementation sdpa or --packing concat",
    )


def _wrapped(facts: Facts, column: int, bits: int) -> Test:
    log, p = e_value(ratios(facts, facts.wrapped_EW[:, column]))
    return Test(
        name=f"ids.wrapped[{bits}]",
        what=f"log of the likelihood ratio: ids were cut to {bits} bits",
        statistic=log,
        p=p,
        says=f"ids from {1 << bits:,} on were stored modulo {1 << bits:,} (likelihood ratio e^{log:.0f})",
        consequence="the mass of every id beyond is taught to an unrelated low id",
        remedy=f"the writer packs ids in {bits} bits: use one that takes this vocabulary, and make the cache again",
    )


def _temperature(facts: Facts) -> Test:
    logs = []
    for column, temperature in enumerate(TEMPERATURES):
        other_E = facts.logp_E / temperature - facts.normaliser_RT[facts.row_E, column]
        logs.append(e_value(ratios(facts, other_E))[0])
    best = TEMPERATURES[int(np.argmax(logs))]
    log, fit = _log_mean(logs), fit_of(facts)
    # Another teacher is flatter or sharper too. It is a temperature where that explains the stored log-probabilities, or where
    # these are the teacher's and only the draws are not.
    cause = fit is None or fit.deviation < AGREEING_NATS or fit.explained > 0.5
    said = (
        f"the targets were drawn at about temperature {best}, not 1"
        if cause
        else (f"the targets fit temperature {best} better than 1, but no temperature explains their log-probabilities")
    )
    return Test(
        name="temperature.draws",
        what=f"log of the likelihood ratio: drawn at one of the temperatures {', '.join(map(str, TEMPERATURES))}",
        statistic=log,
        p=min(1.0, math.exp(-max(log, 0.0))),
        says=f"{said} (likelihood ratio e^{log:.0f})",
        consequence="the student learns a flatter or sharper distribution than the teacher's",
        remedy="make the cache at temperature 1; a loss can soften it when it is read (docs/losses.md)",
        figures={"temperature": best, "cause": cause, "log_ratio": dict(zip(map(str, TEMPERATURES), logs))},
    )


def _elsewhere(facts: Facts, unigram_V: FloatR) -> Test:
    ratio_R = ratios(facts, np.log(unigram_V)[facts.id_E])
    log = _log_mean([float(np.log1p(share * (ratio_R - 1)).sum()) for share in MIXTURES])
    foreign_R = ratio_R > facts.rows / 1e-3  # of a sound row with a chance below 1e-3 / R
    worst = np.argsort(-ratio_R)[: min(20, int(foreign_R.sum()))]
    return Test(
        name="rows.elsewhere",
        what="log of the likelihood ratio: a share of the rows comes from other contexts",
        statistic=log,
        p=min(1.0, math.exp(-max(log, 0.0))),
        says=f"some rows hold targets of other contexts: {int(foreign_R.sum()):,} of {facts.rows:,} are beyond doubt "
        f"(likelihood ratio e^{log:.0f})",
        consequence="those rows teach what follows another text; a per cent of them costs more than a coarse cache does",
        remedy="find where rows were mixed up (sequences beside this list), and make those shards again",
        figures={"beyond_doubt": int(foreign_R.sum()),
                 "rows": [[int(facts.sequence_R[r]), int(facts.row_R[r])] for r in worst]},
    )  # fmt: skip


def _log_mean(logs: Sequence[float]) -> float:
    top = max(logs)
    return top + math.log(sum(math.exp(max(log - top, -700.0)) for log in logs) / len(logs))
