"""Codes back to targets: the one decoder, behind both readers. Vectorised over all rows of a batch of sequences.

Shapes: `R` rows, `E` entries, `H` head entries (those of all rows, back to back).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, NamedTuple

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


class Entries(NamedTuple):
    """Decoded entries of R rows: offsets `[R+1]`, ids, weights and, if wanted, log-probabilities."""

    offsets: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    logp: npt.NDArray[np.float32] | None


def decode_rows(spec: SamplerSpec, vocab_size: int, raw: dict[str, Array], *, logp: bool) -> SparseTargets:
    """Targets of a batch of rows: `decode_entries` and `with_rows`."""
    return with_rows(decode_entries(spec, vocab_size, raw, logp=logp), raw)


def decode_entries(spec: SamplerSpec, vocab_size: int, raw: dict[str, Array], *, logp: bool) -> Entries:
    """Entries of a batch of rows.

    Args:
        spec: the sampler of the cache.
        vocab_size: ids must be below it.
        raw: flat arrays by name, padding removed (`id` int32 codes stand for id_lo and id_hi; they may be overwritten).
        logp: decode the log-probabilities too, where the cache has them.

    Raises:
        DamagedError: the codes contradict each other or an id is out of range.
    """
    offsets = offsets_of(raw["n"], spec.draws + (spec.kind == "threshold"))
    n_R = np.diff(offsets)
    entries = int(offsets[-1])
    ids, weights = np.empty(entries, np.int32), np.empty(entries, np.float32)
    counted = spec.kind in COUNT_KINDS and spec.exponent == 1.0
    if counted or spec.kind == "threshold":
        head_R = count_heads(raw["count"], n_R, spec.draws) if counted else raw["n_head"].astype(np.int64)
        if np.any(head_R > n_R):
            raise DamagedError("a row has more head entries than entries")
        head_H = runs(offsets[:-1], head_R)
        restore_ids(raw["id"], offsets, head_R, head_H, ids)
        if counted:
            weights.fill(np.float32(1) / np.float32(spec.draws))
            weights[head_H] = count_weights(spec.draws).take(raw["count"], mode="clip")
        else:
            _threshold_weights(spec.draws, raw, n_R, head_R, head_H, offsets, weights)
    else:
        ids[:] = raw["id"]
        weights[:] = raw["weight"] if "weight" in raw else _top_weights(spec.draws, raw, offsets)
        check_weights(weights)
        head_H = np.zeros(0, np.int64)
    check_ids(ids, vocab_size)
    wanted = logp and spec.keep_logp != "none"
    return Entries(offsets, ids, weights, _logp(spec, raw, head_H, entries) if wanted else None)


def plain_entries(vocab_size: int, most: int, raw: dict[str, Array]) -> Entries:
    """Entries that are stored decoded, at most `most` in a row, without log-probabilities: profile `fast`.

    Raises:
        DamagedError: an id or weight is out of range, or a row too long.
    """
    offsets = offsets_of(raw["n"], most)
    check_ids(raw["id"], vocab_size)
    check_weights(raw["weight"])
    return Entries(offsets, raw["id"].view(np.int32), raw["weight"], None)


def with_rows(entries: Entries, raw: dict[str, Array]) -> SparseTargets:
    """Entries with the row's own figures; where `label_logp` or `entropy` is left out of `raw`, it comes as NaN."""
    rows = len(entries.offsets) - 1
    return SparseTargets(
        offsets=entries.offsets,
        ids=entries.ids,
        weights=entries.weights,
        label_logp=_or_nan(raw, "label_logp", decode_label_logp, rows),
        entropy=_or_nan(raw, "entropy", decode_entropy, rows),
        logp=entries.logp,
    )


def offsets_of(n_R: Array, most: int) -> npt.NDArray[np.int64]:
    """Where rows begin and end, `[R+1]`.

    Raises:
        DamagedError: a row has more than `most` entries.
    """
    if len(n_R) and n_R.max() > most:
        raise DamagedError(f"a row has {n_R.max()} entries, more than the {most} its draws can give")
    offsets = np.zeros(len(n_R) + 1, np.int64)
    np.cumsum(n_R, out=offsets[1:])
    return offsets


def check_ids(ids: npt.NDArray[np.int32] | npt.NDArray[np.uint32], vocab_size: int) -> None:
    """One pass finds both kinds of bad id: as unsigned, a negative one is huge.

    Raises:
        DamagedError: an id is out of range.
    """
    if len(ids) and int(ids.view(np.uint32).max()) >= vocab_size:
        raise DamagedError(f"an id is not below the vocabulary size {vocab_size}")


def check_weights(weights: npt.NDArray[np.float32]) -> None:
    """Weights are finite and not negative.

    Raises:
        DamagedError: one is not.
    """
    if len(weights) and not (weights.min() >= 0 and weights.max() < np.inf):  # NaN fails both
        raise DamagedError("a weight is negative or not finite")


def _or_nan(
    raw: dict[str, Array], name: str, decode: Callable[[Array], npt.NDArray[np.float32]], rows: int
) -> npt.NDArray[np.float32]:
    return decode(raw[name]) if name in raw else np.full(rows, np.nan, np.float32)


@lru_cache(maxsize=8)
def count_weights(draws: int) -> npt.NDArray[np.float32]:
    """Weight of every count that fits the array, float32."""
    return np.arange((1 << 8) if draws <= 255 else (1 << 16), dtype=np.float32) / np.float32(draws)


def count_heads(count_H: Array, n_R: npt.NDArray[np.int64], draws: int) -> npt.NDArray[np.int64]:
    """Entries drawn more than once in every row: the row ends where its draws are used up, which checks the sums too."""
    repeats_R = draws - n_R
    repeats_R[n_R == 0] = 0
    ended = repeats_R.nonzero()[0]
    due_R = repeats_R.cumsum()
    used_H = np.subtract(count_H, 1, dtype=count_H.dtype).cumsum(dtype=np.int64)
    total = int(due_R[-1]) if len(due_R) else 0
    wrong = DamagedError(f"the counts of a row do not sum to {draws}")
    if (len(n_R) and repeats_R.min() < 0) or total != (int(used_H[-1]) if len(used_H) else 0):
        raise wrong
    is_due = np.zeros(total + 1, np.bool_)
    is_due[due_R[ended]] = True
    end_H = is_due.take(used_H, mode="clip").nonzero()[0]
    if len(end_H) != len(ended):
        raise wrong
    end_H += 1
    head_R = np.zeros(len(n_R), np.int64)
    head_R[ended] = end_H
    head_R[ended[1:]] -= end_H[:-1]
    return head_R


def runs(start_R: npt.NDArray[np.int64], many_R: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """`start_R[r], start_R[r] + 1, ...`, `many_R[r]` of them, for each row: one step at a time, but for a jump at each row."""
    rows = many_R.nonzero()[0]
    start, many = start_R[rows], many_R[rows]
    place = np.ones(int(many.sum()), np.int64)
    if len(rows):
        first = many.cumsum()
        first -= many
        start[1:] -= start[:-1] + many[:-1] - 1
        place[first] = start
        np.add.accumulate(place, out=place)
    return place


def restore_ids(
    code_E: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    head_R: npt.NDArray[np.int64],
    head_H: npt.NDArray[np.int64],
    ids: npt.NDArray[np.int32],
) -> None:
    """Ids of codes (see `layout`): a running sum less what it was before the row's tail; heads as they are.

    The running sum may wrap; differences stay right. What a row must lose is put, negated, where the row begins, so a
    second running sum does the rest.
    """
    if not len(code_E):
        return
    head_code_H = code_E.take(head_H, mode="clip")
    rows = np.flatnonzero(offsets[1:] > offsets[:-1])
    start = offsets[rows]
    before = start + head_R[rows] - 1
    np.add.accumulate(code_E, out=ids)
    lost = ids.take(before, mode="clip")
    if before[0] < 0:
        lost[0] = 0
    code_E[start] -= np.diff(lost, prepend=np.int32(0))
    np.add.accumulate(code_E, out=ids)
    ids[head_H] = head_code_H


def _threshold_weights(
    draws: int,
    raw: dict[str, Array],
    n_R: npt.NDArray[np.int64],
    head_R: npt.NDArray[np.int64],
    head_H: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
    weights: npt.NDArray[np.float32],
) -> None:
    tail_R = tail_units(draws)[raw["tail"]]
    many_R = n_R - head_R
    if np.any((many_R == 0) & (tail_R > 0)) or np.any((head_R == 0) & (tail_R != UNIT) & (n_R > 0)):
        raise DamagedError("the weights of a row do not sum to 1")
    each_R = tail_R // np.maximum(many_R, 1)
    extra_R = tail_R - each_R * many_R
    # Units of every entry as a running sum of steps: each tail starts at its level, the first few of it one unit higher
    # (the left-over units), and the heads between are put in at the end.
    tails = many_R.nonzero()[0]
    start, each, extra = offsets[tails] + head_R[tails], each_R[tails], extra_R[tails]
    units_E = np.zeros(len(weights), np.int32)
    above = extra > 0
    units_E[start] = each + above
    units_E[start[1:]] -= each[:-1].astype(np.int32)
    units_E[(start + extra)[above]] = -1
    np.add.accumulate(units_E, out=units_E)
    if len(head_H):
        units_E[head_H] = _head_units(draws, raw["logp_head"], head_R, tail_R)
    np.multiply(units_E, _PER_UNIT, out=weights)


def _head_units(
    draws: int, code_H: Array, head_R: npt.NDArray[np.int64], tail_R: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Each takes its code's level, but the first of a row: that takes what the row still lacks."""
    units_H = logp_scale(draws).head_units.take(code_H - np.uint8(PIVOT), mode="clip")
    sum_H = np.cumsum(units_H)
    with_R = np.flatnonzero(head_R)
    end = np.cumsum(head_R[with_R])
    first = end - head_R[with_R]
    total = sum_H[end - 1] - sum_H[first] + units_H[first]
    units_H[first] += UNIT - tail_R[with_R] - total
    if units_H[first].min() < 0 or code_H.min() < PIVOT:
        raise DamagedError("a weight of a row is negative")
    return units_H


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


def logp_of_codes(spec: SamplerSpec, code_E: Array) -> npt.NDArray[np.float32]:
    """Log-probabilities of entries whose codes lie side by side; NaN for those of a tail that was not kept."""
    logp_E = logp_scale(spec.draws).logp[code_E]
    if spec.keep_logp == "head":
        logp_E[code_E < PIVOT] = np.nan
    return logp_E


def _logp(
    spec: SamplerSpec, raw: dict[str, Array], head_H: npt.NDArray[np.int64], entries: int
) -> npt.NDArray[np.float32]:
    if spec.kind != "threshold":
        return logp_of_codes(spec, raw["logp"])
    table = logp_scale(spec.draws).logp
    logp_E = np.full(entries, np.nan, np.float32)
    if spec.keep_logp == "all":
        tail_E = np.ones(entries, np.bool_)
        tail_E[head_H] = False
        logp_E[tail_E] = table[raw["logp_tail"]]
    logp_E[head_H] = table[raw["logp_head"]]
    return logp_E
