"""The file of a journal (`journal`): what it looks like, and how to read one that may come from anybody and end anywhere.

`partial/NNNNNN-<16 hex digits>.journal`, all little-endian:

    header   magic "SRJRNL01", digest of `Manifest.identity` [32], shard u32, first sequence (within the shard) u32, crc32c u32
    record   sequences u32, bad rows u32, entries u64; entries of each row u32 [R], label_logp f32 [R], entropy f32 [R],
             ids i32 [E], weights f32 [E], logp f32 [E]; crc32c u32 of all before it

Records follow on each other. Sizes are held against the manifest and the file before anything is allocated; a record is taken
only if its checksum fits and the encoder of its cache takes its rows; at the first that is not taken the file ends.

Shapes: `R` rows, `E` entries of a record.
"""

from __future__ import annotations

import logging
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import google_crc32c
import numpy as np

from stillroom.storage.encode import encode_rows
from stillroom.storage.layout import widest
from stillroom.storage.manifest import Manifest
from stillroom.storage.targets import SparseTargets

_MAGIC: Final = b"SRJRNL01"
_HEADER: Final = struct.Struct("<8s32sII")
_RECORD: Final = struct.Struct("<IIQ")
_CRC: Final = struct.Struct("<I")
_WORD: Final = 4
_LARGEST_LOGP: Final = 1e-3  # float32 may put that of a sure id a little above 0
logger = logging.getLogger("stillroom")


@dataclass(frozen=True, slots=True)
class Kept:
    """Sequences that went through the teacher: the first, within its shard, how many, their targets and their bad rows."""

    first: int
    sequences: int
    targets: SparseTargets
    bad_rows: int


def header(manifest: Manifest, index: int, first: int) -> bytes:
    """The begin of a journal of a shard, from its sequence `first` on."""
    return _sealed(_HEADER.pack(_MAGIC, bytes.fromhex(manifest.identity), index, first))


def record(kept: Kept) -> bytes:
    """The sequences that follow on those before."""
    targets = kept.targets
    counts_R = np.diff(targets.offsets).astype(np.uint32)
    logp = np.full(targets.entries, np.nan, np.float32) if targets.logp is None else targets.logp
    arrays = (counts_R, targets.label_logp, targets.entropy, targets.ids, targets.weights, logp)
    words = [np.ascontiguousarray(array).view(np.uint32).astype("<u4", copy=False).data for array in arrays]
    return _sealed(b"".join([_RECORD.pack(kept.sequences, kept.bad_rows, targets.entries), *words]))


def first_of(path: Path, manifest: Manifest, index: int) -> int | None:
    """The first sequence of a journal of this shard of this run; None where the file is anything else."""
    if (file := _open(path)) is None:
        return None
    with file:
        return _first(file, manifest, index)


def records(path: Path, manifest: Manifest, index: int, *, skip_to: int = 0) -> Iterator[Kept]:
    """Sound records of a journal of this shard of this run, but for those that end by sequence `skip_to`."""
    if (file := _open(path)) is None:
        return
    with file:
        if (first := _first(file, manifest, index)) is None:
            return
        begin, end = manifest.shard_range(index)
        seq_len, left = manifest.packing.seq_len, os.fstat(file.fileno()).st_size - file.tell()
        while len(head := file.read(_RECORD.size)) == _RECORD.size:
            sequences, bad_rows, entries = _RECORD.unpack(head)
            rows, most = sequences * seq_len, sequences * widest(manifest.sampler, seq_len)
            if not 0 < sequences <= end - begin - first or bad_rows > rows or entries > most:
                return
            size = 3 * _WORD * (rows + entries)
            left -= _RECORD.size + size + _CRC.size
            if left < 0:
                return
            if first + sequences <= skip_to:
                file.seek(size + _CRC.size, os.SEEK_CUR)
            else:
                data = head + file.read(size)
                if file.read(_CRC.size) != _crc(data):
                    return
                words = np.frombuffer(data, "<u4", offset=len(head)).astype(np.uint32)
                if (targets := _targets(words, rows, manifest)) is None:
                    return
                yield Kept(first, sequences, targets, bad_rows)
            first += sequences


def _open(path: Path) -> BinaryIO | None:
    """A plain file, to read; no link is followed, and nothing waited for. None where there is no such file to be read."""
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    except FileNotFoundError:  # its shard was committed meanwhile
        return None
    except OSError as error:
        logger.warning("journal %s can not be read (%s): what it holds is done again", path, error.strerror)
        return None
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    return None


def _first(file: BinaryIO, manifest: Manifest, index: int) -> int | None:
    data = file.read(_HEADER.size + _CRC.size)
    if len(data) < _HEADER.size + _CRC.size:
        return None
    first: int = _HEADER.unpack_from(data)[3]
    return first if data == header(manifest, index, first) else None


def _targets(words: np.ndarray[tuple[int], np.dtype[np.uint32]], rows: int, manifest: Manifest) -> SparseTargets | None:
    """The rows of a record, or None where they are none of this manifest's sampler."""
    entries = len(words) // 3 - rows
    counts_R, label_logp, entropy, ids, weights, logp = np.split(words, np.cumsum([rows, rows, rows, entries, entries]))
    offsets = np.zeros(rows + 1, np.int64)
    np.cumsum(counts_R, out=offsets[1:])
    floats = [array.view(np.float32) for array in (weights, label_logp, entropy, logp)]
    seq_len = manifest.packing.seq_len
    try:
        if np.any(floats[-1] > _LARGEST_LOGP):
            raise ValueError(f"log-probabilities came up to {np.nanmax(floats[-1])}")
        targets = SparseTargets(offsets, ids.view(np.int32), *floats)
        # Tokens and random numbers change the codes, not whether there are any.
        encode_rows(manifest, np.zeros((rows // seq_len, seq_len + 1), np.uint32), targets, np.zeros((rows, 3)))
    except ValueError as error:
        logger.warning("a journal holds rows that were not sampled (%s): they are made again", error)
        return None
    return targets


def _sealed(data: bytes) -> bytes:
    return data + _crc(data)


def _crc(data: bytes) -> bytes:
    return _CRC.pack(google_crc32c.value(data))
