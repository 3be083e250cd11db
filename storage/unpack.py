"""Stored chunks straight to targets, sequence by sequence, by the compiled loops of `unpack.c`.

The definition of what codes mean is `decode.py`, in numpy, and this is three to six times as fast. It answers None where the
helper was not compiled, for samplers it does not know, and for anything that is not as it must be: the caller then asks
the numpy decoder, which says what is wrong. `tests/storage/test_unpack.py` holds the two against each other.

Shapes: `B` sequences, `L` rows of a sequence, `R = B * L` rows, `E` entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from stillroom.storage.codes import logp_scale, tail_units
from stillroom.storage.decode import count_weights, logp_of_codes
from stillroom.storage.layout import id_high_bits
from stillroom.storage.manifest import Manifest
from stillroom.storage.room import Room
from stillroom.storage.spec import COUNT_KINDS

try:
    from stillroom.storage import _unpack
except ImportError:  # no compiler when it was installed: numpy does the work
    _HELPER: Any = None
else:
    _HELPER = _unpack

COMPILED: Final = _HELPER is not None
Array = npt.NDArray[Any]
_NONE: Final = np.zeros(0, np.float32)


def unpack(manifest: Manifest, chunks: dict[str, list[Array]], room: Room) -> bool:
    """Put the entries of `B` sequences into `room`; False, and nothing put, where the numpy decoder must do it.

    Args:
        manifest: of the cache.
        chunks: padded chunks by array, one for each sequence, as the readers give them.
        room: where the rows go.
    """
    spec = manifest.sampler
    counted = spec.kind in COUNT_KINDS and spec.exponent == 1.0
    columns: list[Array] = [room.ids, room.weights]
    if not COMPILED:
        return False
    if manifest.profile == "fast" and room.logp is None:
        one = _plain(manifest, chunks)
    elif manifest.profile == "standard" and counted:
        one = _counts(manifest, chunks)
    elif manifest.profile == "standard" and spec.kind == "threshold":
        one = _threshold(manifest, chunks, room.logp is not None)
        columns.append(_NONE if room.logp is None else room.logp)
    else:
        return False
    rows, seq_len, ends = room.rows, manifest.packing.seq_len, [room.entries]
    for i in range(len(chunks["n"])):
        start = ends[-1]
        entries = one(i, start, room.offsets[rows + 1 : rows + 1 + seq_len], *[column[start:] for column in columns])
        if entries < 0:
            return False
        rows += seq_len
        ends.append(start + entries)
    if room.logp is not None and counted:
        parts = [chunk[: stop - start] for chunk, start, stop in zip(chunks["logp"], ends, ends[1:])]
        room.logp[room.entries : ends[-1]] = logp_of_codes(spec, np.concatenate(parts))
    room.rows, room.entries = rows, ends[-1]
    return True


def _plain(manifest: Manifest, chunks: dict[str, list[Array]]) -> Callable[..., int]:
    draws, vocab, n, ids, weights = (
        manifest.sampler.draws,
        manifest.vocab_size,
        *(chunks[k] for k in ("n", "id", "weight")),
    )

    def one(i: int, start: int, *out: Array) -> int:
        return int(_HELPER.plain(draws, vocab, start, n[i], ids[i], weights[i], *out))

    return one


def _high(manifest: Manifest, chunks: dict[str, list[Array]]) -> tuple[int, list[Any]]:
    planes = id_high_bits(manifest.vocab_size)
    return planes, chunks["id_hi"] if planes else [b""] * len(chunks["n"])


def _counts(manifest: Manifest, chunks: dict[str, list[Array]]) -> Callable[..., int]:
    draws, vocab, table = manifest.sampler.draws, manifest.vocab_size, count_weights(manifest.sampler.draws)
    planes, high = _high(manifest, chunks)
    n, low, count = chunks["n"], chunks["id_lo"], chunks["count"]

    def one(i: int, start: int, *out: Array) -> int:
        return int(_HELPER.counts(draws, vocab, planes, start, n[i], low[i], high[i], count[i], table, *out))

    return one


def _threshold(manifest: Manifest, chunks: dict[str, list[Array]], logp: bool) -> Callable[..., int]:
    draws, vocab = manifest.sampler.draws, manifest.vocab_size
    scale, tails = logp_scale(draws), tail_units(draws)
    table = scale.logp if logp else _NONE
    planes, high = _high(manifest, chunks)
    n, low, n_head, head, tail = (chunks[name] for name in ("n", "id_lo", "n_head", "logp_head", "tail"))
    logp_tail: list[Any] = chunks["logp_tail"] if logp and "logp_tail" in chunks else [b""] * len(n)

    def one(i: int, start: int, *out: Array) -> int:
        codes = (n[i], low[i], high[i], n_head[i], head[i], logp_tail[i], tail[i])
        return int(_HELPER.threshold(draws, vocab, planes, start, *codes, scale.head_units, tails, table, *out))

    return one
