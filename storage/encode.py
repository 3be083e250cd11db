"""Targets to codes: the flat arrays of a run of sequences, not yet padded or compressed.

This is the definition; rows as our samplers give them are encoded by the compiled loops of `pack`, to the same bits.
What the arrays mean is in `layout`; what the codes mean, and why no weight can be negative, is in `codes`.

Shapes: `R` rows (S * L), `S` sequences, `L` rows of a sequence, `E` entries, `H` head entries, `T` tail entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from stillroom.storage.codes import (
    PIVOT,
    encode_entropy,
    encode_label_logp,
    encode_tail_mass,
    logp_scale,
    round_systematic,
    tail_code_max,
)
from stillroom.storage.layout import TOP_KINDS
from stillroom.storage.manifest import Manifest
from stillroom.storage.pack import pack
from stillroom.storage.spec import COUNT_KINDS, SamplerSpec
from stillroom.storage.targets import SparseTargets

Array = npt.NDArray[Any]
FloatR3 = npt.NDArray[np.float64]
IntR = npt.NDArray[np.int64]
_Packed = tuple[dict[str, Array], IntR]
_TWICE: Final = "an id came twice in one row, wanted unique ids: merge them first"
SUM_TOLERANCE: Final = 1e-3  # float32 weights of a row against 1


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """Flat arrays by name (`id` stands for id_lo and id_hi) and how many elements each sequence has in each run."""

    arrays: dict[str, Array]
    lengths: dict[str, npt.NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class _Rows:
    """A CSR being encoded: entries sorted, head first within each row."""

    spec: SamplerSpec
    offsets: npt.NDArray[np.int64]
    row_E: npt.NDArray[np.int32]
    id_E: npt.NDArray[np.int32]
    weight_E: npt.NDArray[np.floating]
    logp_E: npt.NDArray[np.float32] | None
    rounding_R3: FloatR3

    @property
    def n_R(self) -> npt.NDArray[np.int64]:
        return np.diff(self.offsets)

    @property
    def first_E(self) -> npt.NDArray[np.int64]:
        return self.offsets[self.row_E]

    def logp(self) -> npt.NDArray[np.float32]:
        if self.logp_E is None:
            raise ValueError(
                f"targets came without logp, sampler {self.spec.kind} keeps it and wanted it: sample with log-probabilities"
            )
        if np.isnan(self.logp_E).any():
            raise ValueError("`logp` came with NaN, wanted the teacher's log-probabilities: check its logits")
        return self.logp_E

    def p(self) -> npt.NDArray[np.float64]:
        return np.exp(self.logp().astype(np.float64))

    def take(self, order_E: npt.NDArray[np.int64]) -> _Rows:
        logp_E = None if self.logp_E is None else self.logp_E[order_E]
        taken = self.id_E[order_E], self.weight_E[order_E], logp_E
        return _Rows(self.spec, self.offsets, self.row_E, *taken, self.rounding_R3)


def encode_rows(
    manifest: Manifest,
    tokens_SL1: Array,
    targets: SparseTargets,
    rounding_R3: FloatR3,
    starts_SL1: npt.NDArray[np.bool_] | None = None,
) -> EncodedRows:
    """Encode the rows of `S` sequences.

    Args:
        manifest: of the cache.
        tokens_SL1: token ids.
        targets: S * L rows as the sampler gave them.
        rounding_R3: `[S*L, 3]` uniforms in [0, 1): head log p, tail mass, tail log p.
        starts_SL1: tokens that begin a document, where the packing is `documents`.

    Raises:
        ValueError: the targets are not what the sampler of the manifest makes.
    """
    seq_len, n_R = manifest.packing.seq_len, np.diff(targets.offsets)
    arrays, head_R = _packed(manifest, targets, rounding_R3) or _by_numpy(manifest, targets, rounding_R3)
    arrays |= {
        "tokens": tokens_SL1.ravel(),
        "n": n_R,
        "label_logp": encode_label_logp(targets.label_logp),
        "entropy": encode_entropy(targets.entropy),
    }
    if starts_SL1 is not None:
        arrays["starts"] = starts_SL1.astype(np.uint8).ravel()
    lengths = {
        "token": np.full(len(tokens_SL1), seq_len + 1),
        "row": np.full(len(tokens_SL1), seq_len),
        "entry": n_R.reshape(-1, seq_len).sum(1),
        "head": head_R.reshape(-1, seq_len).sum(1),
    }
    lengths["tail"] = lengths["entry"] - lengths["head"]
    return EncodedRows(arrays, lengths)


def _packed(manifest: Manifest, targets: SparseTargets, rounding_R3: FloatR3) -> _Packed | None:
    """As `_by_numpy`, compiled, of rows that are in order; None: of any others."""
    packed = pack(manifest, targets, rounding_R3)
    if packed is not None and "count" in packed[0] and manifest.sampler.keep_logp != "none":
        rows = _rows_of(manifest.sampler, targets, rounding_R3)
        packed[0]["logp"] = _logp_codes(rows, rows.p())
    return packed


def _by_numpy(manifest: Manifest, targets: SparseTargets, rounding_R3: FloatR3) -> _Packed:
    """Arrays of the entries, and how many head entries each row has."""
    spec, n_R = manifest.sampler, np.diff(targets.offsets)
    most = spec.draws + 1 if spec.kind == "threshold" else spec.draws
    if n_R.size and n_R.max() > most:
        raise ValueError(f"a row came with {n_R.max()} entries, wanted at most {most} of {spec.kind}: check `draws`")
    if targets.entries and not (targets.ids.min() >= 0 and targets.ids.max() < manifest.vocab_size):
        raise ValueError(
            f"target ids came from {targets.ids.min()} to {targets.ids.max()}, "
            f"wanted 0 to {manifest.vocab_size - 1}: check `vocab_size`"
        )
    if not np.all(np.isfinite(targets.weights)) or np.any(targets.weights < 0):
        raise ValueError("weights came negative or not finite, wanted probabilities: check the teacher's logits")
    rows = _rows_of(spec, targets, rounding_R3)
    if spec.kind == "threshold":
        arrays, head_R, rows = _threshold(rows)
    elif spec.kind in COUNT_KINDS and spec.exponent == 1.0:
        arrays, head_R, rows = _counts(rows)
    elif spec.kind in TOP_KINDS:
        arrays, head_R, rows = _top(rows)
    else:
        arrays, head_R = {"weight": rows.weight_E.astype(np.float32)}, n_R
        if spec.keep_logp != "none":
            arrays["logp"] = _logp_codes(rows, rows.p())
    arrays["id"] = id_codes(rows.id_E, rows.offsets, head_R)
    if _repeated(rows):
        raise ValueError(_TWICE)
    return arrays, head_R


def _rows_of(spec: SamplerSpec, targets: SparseTargets, rounding_R3: FloatR3) -> _Rows:
    row_E = np.repeat(np.arange(targets.rows, dtype=np.int32), np.diff(targets.offsets))
    weight_E = targets.weights if spec.kind in COUNT_KINDS else targets.weights.astype(np.float64)
    return _Rows(spec, targets.offsets, row_E, targets.ids, weight_E, targets.logp, rounding_R3)


def id_codes(id_E: npt.NDArray[np.int32], offsets: IntR, head_R: IntR) -> npt.NDArray[np.uint32]:
    """Ids; in the tail, which ascends, the step from the id before.

    Raises:
        ValueError: a tail does not ascend.
    """
    # Entries that follow a tail entry of their row, as a running sum of +1 and -1: all but heads and firsts of tails.
    tails = np.flatnonzero(np.diff(offsets) > head_R)
    step_E = np.zeros(len(id_E) + 2, np.int8)
    step_E[offsets[tails] + head_R[tails] + 1] = 1
    step_E[offsets[tails + 1]] -= 1
    after_E = np.add.accumulate(step_E[: len(id_E)], dtype=np.int8)
    before_E = after_E.astype(np.int32)
    before_E[1:] *= id_E[:-1]
    code_E = id_E - before_E
    if np.any((code_E <= 0) & after_E.view(np.bool_)):
        raise ValueError(_TWICE)
    return code_E.view(np.uint32)


def _repeated(rows: _Rows) -> bool:
    if not len(rows.id_E):
        return False
    bits = int(rows.id_E.max()).bit_length()
    # Half the time to sort where 32 bits hold it.
    key_type: type[np.unsignedinteger] = np.uint32 if bits + len(rows.n_R).bit_length() <= 32 else np.uint64
    key_E = (rows.row_E.astype(key_type) << key_type(bits)) | rows.id_E.view(np.uint32)
    key_E.sort()
    return bool(np.any(key_E[1:] == key_E[:-1]))


def _sorted(rows: _Rows, key_E: npt.NDArray[np.integer]) -> tuple[_Rows, npt.NDArray[np.int64] | slice]:
    """Rows with their entries by (row, `key_E` below 2**17, id), and the permutation; most samplers come sorted already."""
    key_E = (key_E.astype(np.int64) << 24) | rows.id_E
    ascends_E = key_E[1:] > key_E[:-1]
    begins_E = np.zeros(len(key_E) + 1, np.bool_)
    begins_E[rows.offsets] = True
    ascends_E |= begins_E[1:-1]
    if ascends_E.all():
        return rows, slice(None)
    order_E = np.argsort(key_E | (rows.row_E.astype(np.int64) << 41))
    return rows.take(order_E), order_E


def _row_sums(rows: _Rows, value_E: Array) -> npt.NDArray[np.int64]:
    """Sums of small integers (or truths) over each row."""
    sum_E = np.zeros(len(value_E) + 1, np.int64)
    np.cumsum(value_E, out=sum_E[1:])
    return np.diff(sum_E[rows.offsets])


def _counts(rows: _Rows) -> tuple[dict[str, Array], npt.NDArray[np.int64], _Rows]:
    draws = rows.spec.draws
    exact_E = rows.weight_E * np.float32(draws)
    rounded_E = np.rint(exact_E)
    count_E = rounded_E.astype(np.int32)
    exact_E -= rounded_E
    sum_R = _row_sums(rows, count_E)
    no_counts = len(count_E) and (count_E.min() < 1 or exact_E.max() > 0.01 or exact_E.min() < -0.01)
    if no_counts or np.any((sum_R != draws) & (rows.n_R > 0)):
        raise ValueError(f"weights came that are no counts out of {draws} draws: check `draws`")
    rows, order_E = _sorted(rows, draws - count_E)
    count_E = count_E[order_E]
    head_E = count_E > 1
    arrays: dict[str, Array] = {"count": count_E[head_E]}
    if rows.spec.keep_logp != "none":
        arrays["logp"] = _logp_codes(rows, rows.p())
    return arrays, _row_sums(rows, head_E), rows


def _logp_codes(rows: _Rows, p_E: npt.NDArray[np.floating]) -> Array:
    """Codes of all entries, head and tail each rounded systematically along the row in the order they come."""
    scale = logp_scale(rows.spec.draws)
    head_E = rows.logp() >= scale.pivot_logp
    code_E = np.zeros(len(p_E), np.int64)
    code_E[head_E] = PIVOT + _round(rows, head_E, p_E[head_E], scale.p[PIVOT:], column=0)
    if rows.spec.keep_logp == "all":
        column = 0 if rows.spec.kind in TOP_KINDS else 2
        code_E[~head_E] = _round(rows, ~head_E, p_E[~head_E], scale.p[:PIVOT], column=column)
    return code_E


def _round(
    rows: _Rows, mask_E: npt.NDArray[np.bool_], value: Array, levels: npt.NDArray[np.float64], column: int
) -> IntR:
    row = rows.row_E[mask_E]
    start_R = np.cumsum(np.bincount(row, minlength=len(rows.n_R)))
    start_R = np.concatenate([[0], start_R[:-1]])
    return round_systematic(value.astype(np.float64, copy=False), levels, start_R[row], rows.rounding_R3[row, column])


def _top(rows: _Rows) -> tuple[dict[str, Array], npt.NDArray[np.int64], _Rows]:
    rows, _ = _by_probability(rows, np.zeros(len(rows.row_E), np.int64))
    kept_R = np.bincount(rows.row_E, rows.weight_E, len(rows.n_R))
    if np.any(kept_R > 1 + SUM_TOLERANCE):
        raise ValueError(f"a row came with weights that sum to {kept_R.max():.4f}, wanted at most 1: check the sampler")
    code_E = _logp_codes(rows, rows.weight_E)
    first_E = rows.first_E == np.arange(len(code_E))
    rows, order_E = _sorted(rows, np.where(first_E, 0, 256 - code_E))
    arrays = {"logp": code_E[order_E], "kept": np.minimum(kept_R, 1.0).astype(np.float32)}
    return arrays, rows.n_R, rows


def _by_probability(rows: _Rows, group_E: npt.NDArray[np.int64]) -> tuple[_Rows, npt.NDArray[np.int64]]:
    """Rows by (group, probability descending, id); the argument in `codes` needs this order."""
    same_E = (rows.row_E[1:] == rows.row_E[:-1]) & (group_E[1:] == group_E[:-1])
    wrong_E = same_E & (rows.weight_E[1:] > rows.weight_E[:-1])
    wrong_E |= (rows.row_E[1:] == rows.row_E[:-1]) & (group_E[1:] < group_E[:-1])
    if not wrong_E.any():
        return rows, group_E
    order_E = np.lexsort((rows.id_E, -rows.weight_E, group_E, rows.row_E))
    return rows.take(order_E), group_E[order_E]


def _threshold(rows: _Rows) -> tuple[dict[str, Array], npt.NDArray[np.int64], _Rows]:
    draws, count = rows.spec.draws, len(rows.n_R)
    sum_R = np.bincount(rows.row_E, rows.weight_E, count)
    if np.any((np.abs(sum_R - 1) > SUM_TOLERANCE) & (rows.n_R > 0)):
        raise ValueError("a row of weights came that does not sum to 1, wanted a threshold sample: check the sampler")
    scale = logp_scale(draws)
    rows, tail_E = _by_probability(rows, (rows.logp() < scale.pivot_logp).astype(np.int64))
    head_E = tail_E == 0
    head_R = _row_sums(rows, head_E)

    code_E = np.zeros(len(tail_E), np.int64)
    code_E[head_E] = PIVOT + _round(rows, head_E, rows.weight_E[head_E], scale.p[PIVOT:], column=0)
    # Sort key: the first head entry, the others by code descending, the tail by id.
    first_E = head_E & (rows.first_E == np.arange(len(tail_E)))
    rows, order_E = _sorted(rows, np.where(head_E, np.where(first_E, 0, 256 - code_E), 512))
    arrays: dict[str, Array] = {"n_head": head_R, "logp_head": code_E[order_E][head_E]}

    head_mass_R = np.bincount(rows.row_E[head_E], rows.weight_E[head_E], count)
    tau_R = np.where(rows.n_R > head_R, 1.0 - head_mass_R, 0.0)
    tail_R = encode_tail_mass(tau_R, draws, rows.rounding_R3[:, 1])
    no_head_R = (head_R == 0) & (rows.n_R > 0)
    arrays["tail"] = np.where(no_head_R, tail_code_max(draws), tail_R)
    if rows.spec.keep_logp == "all":
        p = np.exp(rows.logp()[~head_E].astype(np.float64))
        arrays["logp_tail"] = _round(rows, ~head_E, p, scale.p[:PIVOT], column=2)
    return arrays, head_R, rows
