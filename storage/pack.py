"""Targets straight to codes, by the compiled loops of `pack.c`.

The definition of what codes mean is `encode.py` and `codes.py`, in numpy. This answers None where the helper was not
compiled, for samplers it does not know, and for rows that are not just as a sampler of ours gives them (sorted, unique ids,
weights that add up): the caller then asks the numpy encoder, which sorts them or says what is wrong. The codes are the
same either way, to the last bit: `tests/storage/test_pack.py` holds the two against each other.

Shapes: `R` rows, `E` entries, `H` head entries, `T` tail entries, `C` levels.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from stillroom.storage.codes import PIVOT, logp_scale, tail_units
from stillroom.storage.layout import code_arrays_of
from stillroom.storage.manifest import Manifest
from stillroom.storage.spec import COUNT_KINDS
from stillroom.storage.targets import SparseTargets

try:
    from stillroom.storage import _pack
except ImportError:  # no compiler when it was installed: numpy does the work
    _HELPER: Any = None
else:
    _HELPER = _pack

COMPILED: Final = _HELPER is not None
Array = npt.NDArray[Any]
IntR = npt.NDArray[np.int64]


def pack(
    manifest: Manifest, targets: SparseTargets, rounding_R3: npt.NDArray[np.float64]
) -> tuple[dict[str, Array], IntR] | None:
    """What of `encode.encode_rows` is made of entries, but for the `logp` of counts; None where numpy must do it.

    Returns:
        arrays: flat codes by name, in the types they are stored in, and `id` uint32.
        head_R: head entries of every row.
    """
    spec = manifest.sampler
    if _HELPER is None or spec.exponent != 1.0:
        return None
    if spec.kind in COUNT_KINDS:
        return _counts(manifest, targets)
    if spec.kind == "threshold" and targets.logp is not None:
        return _threshold(manifest, targets, targets.logp, rounding_R3)
    return None


def pack_planes(code_E: npt.NDArray[np.uint32], chunk: npt.NDArray[np.uint8]) -> bool:
    """Put bits 16 and up of id codes into zeros, `[planes, bytes]`, lowest bit first; False where numpy must do it."""
    return _HELPER is not None and _HELPER.planes(_plain(code_E), len(chunk), chunk) > 0


def _counts(manifest: Manifest, targets: SparseTargets) -> tuple[dict[str, Array], IntR] | None:
    out = _Room(manifest, targets)
    count_H, head_R = out("count", targets.entries), np.empty(targets.rows, np.int64)
    heads = _HELPER.counts(*_rows(manifest, targets), count_H, out.id_E, head_R)
    return None if heads < 0 else ({"id": out.id_E, "count": count_H[:heads].copy()}, head_R)


def _threshold(
    manifest: Manifest, targets: SparseTargets, logp_E: npt.NDArray[np.float32], rounding_R3: npt.NDArray[np.float64]
) -> tuple[dict[str, Array], IntR] | None:
    spec, out = manifest.sampler, _Room(manifest, targets)
    scale, rounding_R3 = logp_scale(spec.draws), _plain(rounding_R3, np.float64)
    n_head, tail = out("n_head", targets.rows), out("tail", targets.rows)
    logp_H, logp_T = out("logp_head", targets.entries), np.empty(targets.entries)
    draws, vocab, *csr = _rows(manifest, targets)
    tables = (scale.p[PIVOT:], tail_units(spec.draws))
    heads = _HELPER.threshold(
        draws, vocab, float(scale.pivot_logp), *csr, _plain(logp_E), rounding_R3, *tables,
        out.id_E, n_head, tail, logp_H, logp_T,
    )  # fmt: skip
    if heads < 0:
        return None
    head_R = n_head.astype(np.int64)
    arrays = {"id": out.id_E, "n_head": n_head, "logp_head": logp_H[:heads].copy(), "tail": tail}
    if spec.keep_logp == "all":
        p_T = logp_T[: targets.entries - heads]
        np.exp(p_T, out=p_T)  # numpy's own, for the same bits
        offsets = np.zeros(targets.rows + 1, np.int64)
        np.cumsum(np.diff(targets.offsets) - head_R, out=offsets[1:])
        code_T = out("logp_tail", len(p_T))
        if _HELPER.round(offsets, p_T, scale.p[:PIVOT], rounding_R3, 2, 3, 0, code_T) < 0:
            return None
        arrays["logp_tail"] = code_T
    return arrays, head_R


class _Room:
    """Makes arrays for codes, of the type a shard stores them in."""

    def __init__(self, manifest: Manifest, targets: SparseTargets) -> None:
        self._dtypes: Final = {array.name: array.dtype for array in code_arrays_of(manifest)}
        self.id_E: Final = np.empty(targets.entries, np.uint32)

    def __call__(self, name: str, size: int) -> Array:
        return np.empty(size, self._dtypes[name])


def _rows(manifest: Manifest, targets: SparseTargets) -> tuple[int, int, Array, Array, Array]:
    csr = (_plain(x) for x in (targets.offsets, targets.ids, targets.weights))
    return manifest.sampler.draws, manifest.vocab_size, *csr  # type: ignore[return-value]


def _plain(array: Array, dtype: npt.DTypeLike | None = None) -> Array:
    """As C takes it: contiguous and aligned; the very array where it is so."""
    return np.require(array, dtype, ["C", "A"])
