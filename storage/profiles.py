"""Profiles `fast` and `small`: the standard codes stored another way, and back, without loss.

Shapes: `R` rows, `E` entries, `H` head entries, `T` tail entries (of all rows, back to back), `V` vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stillroom.storage.decode import check_ids, count_heads, decode_rows, restore_ids, runs
from stillroom.storage.encode import EncodedRows, id_codes
from stillroom.storage.errors import DamagedError
from stillroom.storage.manifest import Manifest
from stillroom.storage.spec import COUNT_KINDS

Array = npt.NDArray[Any]
IntV = npt.NDArray[np.uint32]


class _Places:
    """Where the heads and tails of rows lie among their entries."""

    def __init__(self, manifest: Manifest, arrays: dict[str, Array]) -> None:
        spec = manifest.sampler
        self.n_R = arrays["n"].astype(np.int64)
        self.offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.n_R)])
        if "n_head" in arrays:
            self.head_R = arrays["n_head"].astype(np.int64)
        elif spec.kind in COUNT_KINDS and spec.exponent == 1.0:
            self.head_R = count_heads(arrays["count"], self.n_R, spec.draws)
        else:
            self.head_R = self.n_R
        if np.any(self.head_R > self.n_R):
            raise DamagedError("a row has more head entries than entries")
        self.tail_R = self.n_R - self.head_R
        self.head_H = runs(self.offsets[:-1], self.head_R)
        self.tail_T = runs(self.offsets[:-1] + self.head_R, self.tail_R)
        self.tail_row_T = np.repeat(np.arange(len(self.n_R)), self.tail_R)


def ids_by_use(manifest: Manifest, blocks: list[EncodedRows]) -> IntV:
    """`id_of_rank` of a shard, `[V]`: its ids by how often it has them, then by id."""
    times_V = np.zeros(manifest.vocab_size, np.int64)
    for block in blocks:
        times_V += np.bincount(_ids(manifest, block), minlength=manifest.vocab_size)
    return np.argsort(-times_V, kind="stable").astype(np.uint32)


def check_ranks(id_of_rank_V: IntV) -> None:
    """Every id has one rank.

    Raises:
        DamagedError: one has none or two.
    """
    top = len(id_of_rank_V)
    if id_of_rank_V.max() >= top or np.bincount(id_of_rank_V, minlength=top).max() > 1:
        raise DamagedError(f"id_of_rank does not name each of the {top} ids once")


def to_profile(manifest: Manifest, block: EncodedRows, id_of_rank_V: IntV | None) -> EncodedRows:
    """Standard codes to what the profile stores; `id_of_rank_V` is `small`'s."""
    if manifest.profile == "standard":
        return block
    arrays = {name: array for name, array in block.arrays.items() if name != "id"}
    if manifest.profile == "fast":
        arrays["id"] = _ids(manifest, block).astype(np.uint32)
        raw = {**block.arrays, "id": block.arrays["id"].astype(np.int32)}
        arrays["weight"] = decode_rows(manifest.sampler, manifest.vocab_size, raw, logp=False).weights
        return EncodedRows(arrays, block.lengths)
    assert id_of_rank_V is not None
    places = _Places(manifest, block.arrays)
    rank_of_id_V = np.empty(manifest.vocab_size, np.int64)
    rank_of_id_V[id_of_rank_V] = np.arange(manifest.vocab_size)
    rank_E = rank_of_id_V[_ids(manifest, block)]
    arrays["head_rank"] = rank_E[places.head_H].astype(np.uint32)
    rank_T = rank_E[places.tail_T]
    order_T = np.argsort((places.tail_row_T << 24) | rank_T)
    arrays["tail_rank"] = _steps(rank_T[order_T], places.tail_row_T)
    _permute_tail(arrays, places, order_T)
    return EncodedRows(arrays, block.lengths)


def from_profile(manifest: Manifest, arrays: dict[str, Array], id_of_rank_V: IntV | None) -> dict[str, Array]:
    """What the profile stores back to standard codes, `id` as int32 for `decode_rows`.

    Raises:
        DamagedError: the arrays contradict each other.
    """
    if manifest.profile == "standard":
        return arrays
    places = _Places(manifest, arrays)
    codes = {name: a for name, a in arrays.items() if name not in ("id", "head_rank", "tail_rank", "id_of_rank")}
    if manifest.profile == "fast":
        if manifest.sampler.exponent == 1.0:
            codes.pop("weight")
        ids = arrays["id"].view(np.int32)
        check_ids(ids, manifest.vocab_size)
    else:
        assert id_of_rank_V is not None
        top, head_H, step_T = manifest.vocab_size, arrays["head_rank"].astype(np.int64), arrays["tail_rank"]
        sum_T = np.concatenate([np.zeros(1, np.int64), np.cumsum(step_T, dtype=np.int64)])
        before_R = np.concatenate([np.zeros(1, np.int64), np.cumsum(places.tail_R)])[:-1]
        rank_T = sum_T[1:] - np.repeat(sum_T[before_R], places.tail_R)
        if (len(rank_T) and rank_T.max() >= top) or (len(head_H) and head_H.max() >= top):
            raise DamagedError(f"a rank is not below the vocabulary size {top}")
        ids = np.empty(len(places.head_H) + len(places.tail_T), np.int32)
        ids[places.head_H] = id_of_rank_V[head_H]
        id_T = id_of_rank_V[rank_T].astype(np.int64)
        order_T = np.argsort((places.tail_row_T << 24) | id_T)
        ids[places.tail_T] = id_T[order_T]
        _permute_tail(codes, places, order_T)
    try:
        codes["id"] = id_codes(ids, places.offsets, places.head_R).view(np.int32)
    except ValueError as error:
        raise DamagedError("an id comes twice in a row") from error
    return codes


def _ids(manifest: Manifest, block: EncodedRows) -> npt.NDArray[np.int32]:
    places, code_E = _Places(manifest, block.arrays), block.arrays["id"].astype(np.int32)
    ids = np.empty(len(code_E), np.int32)
    restore_ids(code_E, places.offsets, places.head_R, places.head_H, ids)
    return ids


def _steps(value_T: npt.NDArray[np.int64], row_T: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
    """Each but a row's first as the step from the one before."""
    step_T = value_T.copy()
    same_T = row_T[1:] == row_T[:-1]
    step_T[1:][same_T] -= value_T[:-1][same_T]
    return step_T.astype(np.uint32)


def _permute_tail(arrays: dict[str, Array], places: _Places, order_T: npt.NDArray[np.int64]) -> None:
    """What is stored of the tail, in the new order of its entries."""
    if "logp_tail" in arrays:
        arrays["logp_tail"] = arrays["logp_tail"][order_T]
    for name in ("logp", "weight"):
        if name in arrays:
            arrays[name] = arrays[name].copy()
            arrays[name][places.tail_T] = arrays[name][places.tail_T][order_T]
