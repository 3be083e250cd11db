"""Codes back to targets: the one decoder, behind both readers. Vectorised over all rows of a batch of sequences.

Shapes: `R` rows, `E` entries, `H` head entries (those of all rows, back to back).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from stillroom.storage.codes import (
    PIVOT,
    UNIT,
    decode_entropy,
    decode_label_logp,
    logp_scale,
    tail_units,
)
from stillroom.storage.errors import DamagedError
from stillroom.storage.spec import COUNT_KINDS, SamplerSpec
from stillroom.storage.targets import SparseTargets

Array = npt.NDArray[Any]
_PER_UNIT: Final = np.float32(1 / UNIT)


def decode_rows(spec: SamplerSpec, vocab_size: int, raw: dict[str, Array], *, logp: bool) -> SparseTargets:
    """Targets of a batch of rows.

    Args:
        spec: the sampler of the cache.
        vocab_size: ids must be below it.
        raw: flat arrays by name, padding removed (`id` int32 codes stand for id_lo and id_hi).
        logp: decode the log-probabilities too, where the cache has them.

    Raises:
        DamagedError: the codes contradict each other or an id is out of range.
    """
    n_R = raw["n"].astype(np.int64)
    offsets = np.zeros(len(n_R) + 1, np.int64)
    np.cumsum(n_R, out=offsets[1:])
    counted = spec.kind in COUNT_KINDS and spec.exponent == 1.0
    if counted or spec.kind == "threshold":
        head_R = _count_heads(raw["count"], n_R, spec.draws) if counted else raw["n_head"].astype(np.int64)
        if np.any(head_R > n_R):
            raise DamagedError("a row has more head entries than entries")
        head_end_R = np.cumsum(head_R)
        head_H = np.arange(head_end_R[-1] if len(head_end_R) else 0)
        head_H += np.repeat(offsets[:-1] - head_end_R + head_R, head_R)
        ids = _ids(raw["id"], offsets, n_R, head_R, head_H)
        if counted:
            weights = np.full(len(ids), np.float32(1) / np.float32(spec.draws))
            weights[head_H] = _count_weights(spec.draws).take(raw["count"])
        else:
            weights = _threshold_weights(spec.draws, raw, n_R, head_R, head_end_R, head_H, offsets)
    else:
        ids = raw["id"]
        weights = raw["weight"] if "weight" in raw else _top_weights(spec.draws, raw, offsets)
        head_H = np.zeros(0, np.int64)
    # One pass finds both kinds of bad id: as unsigned, a negative one is huge.
    if len(ids) and int(ids.view(np.uint32).max()) >= vocab_size:
        raise DamagedError(f"an id is not below the vocabulary size {vocab_size}")
    return SparseTargets(
        offsets=offsets,
        ids=ids,
        weights=weights,
        label_logp=decode_label_logp(raw["label_logp"]),
        entropy=decode_entropy(raw["entropy"]),
        logp=_logp(spec, raw, head_H, len(ids)) if logp and spec.keep_logp != "none" else None,
    )


@lru_cache(maxsize=8)
def _count_weights(draws: int) -> npt.NDArray[np.float32]:
    return np.arange((1 << 8) if draws <= 255 else (1 << 16), dtype=np.float32) / np.float32(draws)


def _count_heads(count_H: Array, n_R: npt.NDArray[np.int64], draws: int) -> npt.NDArray[np.int64]:
    """Entries drawn more than once in every row: the row ends where its draws are used up, which checks the sums too."""
    repeats_R = draws - n_R
    repeats_R[n_R == 0] = 0
    ended = repeats_R.nonzero()[0]
    due_R = repeats_R.cumsum()
    used_H = (count_H - count_H.dtype.type(1)).cumsum(dtype=np.int64)
    total = int(due_R[-1]) if len(due_R) else 0
    wrong = DamagedError(f"the counts of a row do not sum to {draws}")
    if (len(n_R) and repeats_R.min() < 0) or total != (int(used_H[-1]) if len(used_H) else 0):
        raise wrong
    is_due = np.zeros(total + 1, np.bool_)
    is_due[due_R[ended]] = True
    end_H = is_due.take(used_H).nonzero()[0]
    if len(end_H) != len(ended):
        raise wrong
    end_H += 1
    head_R = np.zeros(len(n_R), np.int64)
    head_R[ended] = end_H
    head_R[ended[1:]] -= end_H[:-1]
    return head_R


def _ids(
    code_E: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    n_R: npt.NDArray[np.int64],
    head_R: npt.NDArray[np.int64],
    head_H: npt.NDArray[np.int64],
) -> npt.NDArray[np.int32]:
    # A running sum over everything, less what it was before the row's tail. It may wrap; differences stay right.
    sum_E = np.cumsum(code_E, dtype=np.int32)
    before_R = offsets[:-1] + head_R - 1
    base_R = sum_E.take(before_R, mode="clip") if len(sum_E) else np.zeros(len(n_R), np.int32)
    if before_R.size and before_R[0] < 0:
        base_R[before_R < 0] = 0
    sum_E -= np.repeat(base_R, n_R)
    sum_E[head_H] = code_E.take(head_H)
    return sum_E


def _threshold_weights(
    draws: int,
    raw: dict[str, Array],
    n_R: npt.NDArray[np.int64],
    head_R: npt.NDArray[np.int64],
    head_end_R: npt.NDArray[np.int64],
    head_H: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
) -> npt.NDArray[np.float32]:
    tail_R = tail_units(draws)[raw["tail"]]
    many_R = n_R - head_R
    if np.any((many_R == 0) & (tail_R > 0)) or np.any((head_R == 0) & (tail_R != UNIT) & (n_R > 0)):
        raise DamagedError("the weights of a row do not sum to 1")
    each_R = tail_R // np.maximum(many_R, 1)
    extra_R = tail_R - each_R * many_R
    weights = np.repeat(each_R.astype(np.float32) * _PER_UNIT, n_R)
    if extra_R.any():  # the left-over units go one each to the first tail entries
        end_R = np.cumsum(extra_R)
        place = np.arange(end_R[-1])
        place += np.repeat(offsets[:-1] + head_R - end_R + extra_R, extra_R)
        weights[place] += _PER_UNIT
    if not len(head_H):
        return weights
    units_H = logp_scale(draws).head_units.take(raw["logp_head"] - np.uint8(PIVOT), mode="clip")
    sum_H = np.cumsum(units_H)
    with_R = np.flatnonzero(head_R)
    first = head_end_R[with_R] - head_R[with_R]
    total = sum_H[head_end_R[with_R] - 1] - sum_H[first] + units_H[first]
    units_H[first] += UNIT - tail_R[with_R] - total
    if units_H[first].min() < 0 or raw["logp_head"].min() < PIVOT:
        raise DamagedError("a weight of a row is negative")
    weights[head_H] = units_H.astype(np.float32) * _PER_UNIT
    return weights


def _top_weights(draws: int, raw: dict[str, Array], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Every entry but the row's first takes its code's level; the first takes the rest of the kept mass."""
    p_E = logp_scale(draws).p[raw["logp"]]
    rows = np.flatnonzero(np.diff(offsets))
    kept = raw["kept"][rows].astype(np.float64)
    first, end = offsets[rows], offsets[rows + 1]
    sum_E = np.cumsum(p_E)
    p_E[first] = kept - (sum_E[end - 1] - sum_E[first])
    if not np.all((kept >= 0) & (kept <= 1)) or np.any(p_E[first] < -1e-9):
        raise DamagedError("the kept mass of a row is not that of its entries")
    return np.maximum(p_E, 0).astype(np.float32)


def _logp(
    spec: SamplerSpec, raw: dict[str, Array], head_H: npt.NDArray[np.int64], entries: int
) -> npt.NDArray[np.float32]:
    table = logp_scale(spec.draws).logp
    if spec.kind != "threshold":
        logp_E = table[raw["logp"]]
        if spec.keep_logp == "head":
            logp_E[raw["logp"] < PIVOT] = np.nan
        return logp_E
    logp_E = np.full(entries, np.nan, np.float32)
    if spec.keep_logp == "all":
        tail_E = np.ones(entries, np.bool_)
        tail_E[head_H] = False
        logp_E[tail_E] = table[raw["logp_tail"]]
    logp_E[head_H] = table[raw["logp_head"]]
    return logp_E
