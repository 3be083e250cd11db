"""Statistics of all rows of a cache, from the cache alone: how sure the teacher was of the labels, and how undecided.

What is stored of a row's label log-probability and entropy has few levels (`codes`), so a count of each level is the whole
distribution, exactly, in half a megabyte, and the means of the sequences take eight bytes each. It is computed once and
kept as `derived/rows.arrow` (`sidecar`); shards that came since are added, anything else about it that does not fit lets
it be computed again.

Shapes: `S` sequences at hand, `G` of a group, `L` rows of a sequence, `C` codes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from stillroom.storage.cache import Cache
from stillroom.storage.codes import ENTROPY_STEP, LABEL_LOGP_STEP, decode_entropy, decode_label_logp
from stillroom.storage.errors import FormatError, InputError
from stillroom.storage.sidecar import keep, pack, unpack

ROWS_NAME: Final = "rows.arrow"
ROWS_KIND: Final = "stillroom-rows 1"
RowColumn = Literal["label_logp", "entropy"]
_CODES: Final = {"label_logp": 65536, "entropy": 256}  # the last one stands for none
_GROUP_ROWS: Final = 1 << 20
_DTYPES: Final = {
    "shards": np.int64,
    "rows_S": np.int64,
    "label_logp_S": np.float32,
    "entropy_S": np.float32,
    "label_logp_C": np.int64,
    "entropy_C": np.int64,
}
_BY_SEQUENCE: Final = ("rows_S", "label_logp_S", "entropy_S")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class RowStatistics:
    """The rows with a target of some shards.

    Attributes:
        shards: their indices, ascending.
        rows_S: rows with a target of each sequence, int64.
        label_logp_S: mean of the label's log-probability over them, float32 nats; NaN where there are none.
        entropy_S: mean of the entropy, likewise.
        label_logp_C: rows by code of the label's log-probability, `[65536]` int64; the last: without a label.
        entropy_C: rows by code of the entropy, `[256]` int64; the last: without one.
    """

    shards: npt.NDArray[np.int64]
    rows_S: npt.NDArray[np.int64]
    label_logp_S: npt.NDArray[np.float32]
    entropy_S: npt.NDArray[np.float32]
    label_logp_C: npt.NDArray[np.int64]
    entropy_C: npt.NDArray[np.int64]

    @property
    def rows(self) -> int:
        """Rows with a target."""
        return int(self.rows_S.sum())

    def quantile(self, share: float, column: RowColumn = "label_logp") -> float:
        """The smallest value that at least `share` of the rows do not exceed, nats: exact, as from sorting all rows.

        Args:
            share: 0 (the smallest value) to 1 (the largest).
            column: `label_logp` or `entropy`.

        Raises:
            InputError: no row has a value, a share outside [0, 1], or another column.
        """
        value_C, count_C = self.distribution(column)
        if not 0.0 <= share <= 1.0:
            raise InputError(f"share came as {share}, wanted 0 to 1: the share of rows at or below the quantile")
        total = int(count_C.sum())
        rank = min(max(1, math.ceil(share * total)), total)
        return float(value_C[np.searchsorted(np.cumsum(count_C), rank)])

    def distribution(self, column: RowColumn) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """The values that rows have, ascending, and how many rows have each.

        Raises:
            InputError: no row has a value, or another column.
        """
        if column not in _CODES:
            raise InputError(f"column came as {column!r}, wanted label_logp or entropy")
        count_C = self.label_logp_C if column == "label_logp" else self.entropy_C
        code = np.flatnonzero(count_C[:-1])
        if not len(code):
            raise InputError(f"no row of the cache has a target with {column}, so it has no distribution")
        if column == "label_logp":  # stored negated
            code = code[::-1]
            return decode_label_logp(code.astype(np.uint16)), count_C[code]
        return decode_entropy(code.astype(np.uint8)), count_C[code]


def row_statistics(
    cache: Cache, *, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> RowStatistics:
    """Statistics of the rows at hand, from beside the cache if they are there and fit, else computed and kept.

    Of a remote cache the local directory keeps them; computing them there reads every shard once.

    Args:
        cache: an open cache, whatever its columns.
        on_progress: told (shards done, shards to do).

    Raises:
        DamagedError: a shard is damaged.
        CacheError: a store that kept failing.
    """
    known = _kept(cache)
    there = set() if known is None else set(known.shards.tolist())
    missing = [shard for shard in cache.shards if shard not in there]
    if known is not None and not missing:
        return known
    parts: dict[int, dict[str, npt.NDArray[Any]]] = {}
    counts = {name: np.zeros(many, np.int64) for name, many in _CODES.items()}
    for done, shard in enumerate(missing):
        parts[shard] = _of_shard(cache, shard, counts)
        on_progress(done + 1, len(missing))
    if known is not None:
        start = 0
        for shard in known.shards.tolist():
            stop = start + _length(cache, shard)
            parts[shard] = {name: getattr(known, name)[start:stop] for name in _BY_SEQUENCE}
            start = stop
        counts["label_logp"] += known.label_logp_C
        counts["entropy"] += known.entropy_C
    columns = {
        "shards": np.array(cache.shards, np.int64),
        **{
            name: np.concatenate([np.zeros(0, _DTYPES[name]), *(parts[shard][name] for shard in cache.shards)])
            for name in _BY_SEQUENCE
        },
        "label_logp_C": counts["label_logp"],
        "entropy_C": counts["entropy"],
    }
    keep(cache.path, ROWS_NAME, pack(ROWS_KIND, cache.manifest, columns))
    return RowStatistics(**columns)


def _of_shard(cache: Cache, shard: int, counts: dict[str, npt.NDArray[np.int64]]) -> dict[str, npt.NDArray[Any]]:
    """Rows and means of the sequences of a shard; their codes are added to `counts`."""
    sequences, seq_len = _length(cache, shard), cache.manifest.packing.seq_len
    step = max(1, _GROUP_ROWS // seq_len)
    groups: list[dict[str, npt.NDArray[Any]]] = []
    for start in range(0, sequences, step):
        raw = cache.row_codes(shard, start, min(start + step, sequences), ("n", "label_logp", "entropy"))
        row_GL = raw["n"] > 0
        group: dict[str, npt.NDArray[Any]] = {"rows_S": row_GL.sum(1, dtype=np.int64)}
        for name, level in (("label_logp", -LABEL_LOGP_STEP), ("entropy", ENTROPY_STEP)):
            code_GL, last = raw[name], _CODES[name] - 1
            counts[name] += np.bincount(code_GL[row_GL], minlength=last + 1)
            has_GL = row_GL & (code_GL != last)
            sum_G, many_G = np.where(has_GL, code_GL, 0).sum(1, dtype=np.int64), has_GL.sum(1)
            group[f"{name}_S"] = np.where(many_G > 0, sum_G * level / np.maximum(many_G, 1), np.nan).astype(np.float32)
        groups.append(group)
    return {name: np.concatenate([group[name] for group in groups]) for name in groups[0]}


def _kept(cache: Cache) -> RowStatistics | None:
    """What lies beside the cache, if it is of shards that are all at hand; it may lack some."""
    path = cache.derived(ROWS_NAME)
    try:
        columns, _ = unpack(path, ROWS_KIND, cache.manifest, _DTYPES)
        found = RowStatistics(**columns)
        _check(cache, found)
    except FileNotFoundError:
        return None
    except FormatError as error:
        logger.warning("%s; it is computed again", error)
        return None
    return found if set(found.shards.tolist()) <= set(cache.shards) else None


def _check(cache: Cache, found: RowStatistics) -> None:
    """Refuse what no cache of this manifest has."""
    manifest, shards = cache.manifest, found.shards
    wrong = FormatError(f"{ROWS_NAME} contradicts itself or the manifest: delete it")
    if np.any(np.diff(shards) <= 0) or (len(shards) and not 0 <= shards[0] <= shards[-1] < manifest.shards):
        raise wrong
    sequences = sum(_length(cache, shard) for shard in shards.tolist())
    if any(len(values) != sequences for values in (found.rows_S, found.label_logp_S, found.entropy_S)):
        raise wrong
    if sequences and not 0 <= found.rows_S.min() <= found.rows_S.max() <= manifest.packing.seq_len:
        raise wrong
    for count_C, many in ((found.label_logp_C, 65536), (found.entropy_C, 256)):
        if len(count_C) != many or count_C.min() < 0 or count_C.sum() != found.rows_S.sum():
            raise wrong
    if np.isinf(found.label_logp_S).any() or np.isinf(found.entropy_S).any():
        raise wrong


def _length(cache: Cache, shard: int) -> int:
    start, stop = cache.manifest.shard_range(shard)
    return stop - start
