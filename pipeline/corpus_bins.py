"""Corpora that are tokenised already, in the two layouts of binary files that are common; mapped, never read whole.

All numbers are little-endian.

- Megatron-LM (`core/datasets/indexed_dataset.py`): `NAME.bin` is ids end to end. `NAME.idx` is the 9 bytes `MMIDIDX\\0\\0`,
  the version (u64, 1), a code for the kind of ids (u8), the number of sequences `S` (u64) and of document bounds `D1`
  (u64), then `S` lengths (i32), `S` first bytes (i64) and the `D1` bounds (i64): document `d` is the sequences
  `bound[d]:bound[d + 1]`.
- datatrove (`pipeline/tokens/tokenizer.py`): `NAME.ds` is ids end to end, u16 or u32. `NAME.ds.index` is the end of each
  document, in ids (u64). `NAME.ds.metadata`, where there is one, is text: the tokenizer's name, `|` and bytes per id; then the
  number of ids.

Every number of an index is checked before it is used: a damaged or hostile one is refused, and no id is read twice.

Shapes: `N` ids of a file, `S` sequences, `D` documents, `D1` = D + 1.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from stillroom.storage.errors import InputError

BIN_SUFFIXES: Final = (".bin", ".ds")
AT_A_TIME: Final = 1 << 16  # entries of an index in memory

_MAGIC: Final = b"MMIDIDX\0\0"
_HEADER: Final = struct.Struct("<9sQBQQ")
_ID_TYPES: Final = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floating point
_METADATA_BYTES: Final = 1 << 16

Ids = npt.NDArray[np.integer[Any]]
Index = npt.NDArray[Any]


def index_of(file: Path) -> Path:
    """The file beside `file` that says where its documents end."""
    return file.with_suffix(".idx") if file.suffix == ".bin" else file.with_name(f"{file.name}.index")


def bin_documents(file: Path) -> Iterator[Ids]:
    """Documents of a `.bin` or `.ds` file, in order, as views of the mapped file; also empty ones.

    Raises:
        InputError: an index that is missing, of another layout, or does not fit the file.
        OSError: a file that can not be read.
    """
    index = index_of(file)
    if not index.is_file():
        raise InputError(
            f"{file} has no {index.name} beside it, which says where its documents end: name a file written by Megatron-LM's "
            "or datatrove's tools, with its index"
        )
    id_N, ends = _megatron(file, index) if file.suffix == ".bin" else _datatrove(file, index)
    start = 0
    for end_D in ends:
        for end in end_D.tolist():
            yield id_N[start:end]
            start = end


def _megatron(file: Path, index: Path) -> tuple[Ids, Iterator[Index]]:
    with index.open("rb") as opened:
        head = opened.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise InputError(f"{index} does not begin as a Megatron-LM index does: write it again, or name another file")
    _, version, code, sequences, bounds = _HEADER.unpack(head)
    if version != 1 or code not in _ID_TYPES:
        raise InputError(
            f"{index} is of version {version} with ids of kind {code}, wanted version 1 and a kind of {_listed(_ID_TYPES)} "
            "(integers): write it again"
        )
    _check_size(
        index, _HEADER.size + 12 * sequences + 8 * bounds, f"{sequences} sequences and {bounds} document bounds"
    )
    kind = np.dtype(_ID_TYPES[code])
    id_N, at = _mapped(file, kind), _HEADER.size
    length_S = _mapped(index, np.dtype("<i4"), at, sequences)
    byte_S = _mapped(index, np.dtype("<i8"), at + 4 * sequences, sequences)
    bound_D1 = _mapped(index, np.dtype("<i8"), at + 12 * sequences, bounds)
    end = 0
    for first in range(0, sequences, AT_A_TIME):
        length, byte = (x[first : first + AT_A_TIME].astype(np.int64) for x in (length_S, byte_S))
        ends = end + np.cumsum(length)  # below 2**63: `end` is within the file, lengths are 32 bits
        if length.min() < 0 or ends[-1] > len(id_N) or (byte != (ends - length) * kind.itemsize).any():
            raise InputError(
                f"{index} gives sequences {first} to {first + len(length) - 1} lengths or places that do not follow one another "
                f"within the {len(id_N)} ids of {file.name}: write both again"
            )
        end = int(ends[-1])
    if end != len(id_N) or bounds < 1 or bound_D1[0] != 0 or bound_D1[-1] != sequences:
        raise InputError(
            f"{index} accounts for {end} ids in {sequences} sequences, {file.name} holds {len(id_N)} and the documents end at "
            f"sequence {bound_D1[-1] if bounds else 0}: the two do not belong together, write both again"
        )
    return id_N, _megatron_ends(index, bound_D1, byte_S, kind.itemsize, len(id_N))


def _megatron_ends(index: Path, bound_D1: Index, byte_S: Index, id_bytes: int, ids: int) -> Iterator[Index]:
    """Ends of documents in ids, `AT_A_TIME` at a time."""
    for last, bound_D in _blocks_after(bound_D1[1:]):
        if bound_D[0] < last or (bound_D[1:] < bound_D[:-1]).any() or bound_D[-1] > len(byte_S):
            raise InputError(f"{index} has document bounds that do not ascend: write it again")
        end_D = np.full(len(bound_D), ids, np.int64)
        inner_D = bound_D < len(byte_S)
        end_D[inner_D] = byte_S[bound_D[inner_D]] // id_bytes
        yield end_D


def _datatrove(file: Path, index: Path) -> tuple[Ids, Iterator[Index]]:
    size, index_size = file.stat().st_size, index.stat().st_size
    if index_size % 8:
        raise InputError(f"{index} is {index_size} bytes long, wanted 8 for each document: write it again")
    end_D = _mapped(index, np.dtype("<u8"), 0, index_size // 8)
    total = int(end_D[-1]) if len(end_D) else 0
    id_bytes = next((width for width in (2, 4) if total * width == size), None)
    said = _metadata(file.with_name(f"{file.name}.metadata"))
    if id_bytes is None or (said is not None and size and said != (id_bytes, total)):
        of = "" if said is None else f", its .metadata speaks of {said[1]} ids of {said[0]} bytes"
        raise InputError(
            f"{index} ends at id {total}, {file.name} is {size} bytes long{of}, wanted 2 or 4 bytes for every id: they do not "
            "belong together, write them again"
        )
    return _mapped(file, np.dtype(f"<u{id_bytes}")), _datatrove_ends(index, end_D)


def _datatrove_ends(index: Path, end_D: Index) -> Iterator[Index]:
    whole = int(end_D[-1]) if len(end_D) else 0
    for last, end in _blocks_after(end_D):
        if int(end[0]) < last or (end[1:] < end[:-1]).any() or int(end[-1]) > whole:
            raise InputError(f"{index} has document ends that do not ascend: write it again")
        yield end.astype(np.int64)


def _metadata(file: Path) -> tuple[int, int] | None:
    """Bytes per id and number of ids that a `.metadata` file speaks of."""
    if not file.is_file():
        return None
    with file.open("rb") as opened:
        lines = opened.read(_METADATA_BYTES).decode("utf-8", "replace").splitlines()
    try:
        return int(lines[0].rpartition("|")[2]), int(lines[1])
    except (IndexError, ValueError) as error:
        raise InputError(
            f"{file} does not say `TOKENIZER|BYTES` and a number of ids on its first two lines: write it again, or remove it"
        ) from error


def _blocks_after(value_D: Index) -> Iterator[tuple[int, Index]]:
    """Blocks of an index, each with the value before it."""
    last = 0
    for first in range(0, len(value_D), AT_A_TIME):
        block = np.array(value_D[first : first + AT_A_TIME])
        yield last, block
        last = int(block[-1])


def _mapped(file: Path, kind: np.dtype[Any], offset: int = 0, count: int | None = None) -> npt.NDArray[Any]:
    size = file.stat().st_size
    if count is None:
        if size % kind.itemsize:
            raise InputError(
                f"{file} is {size} bytes long, wanted a multiple of {kind.itemsize} per id: write it again"
            )
        count = size // kind.itemsize
    if not count:  # nothing can be mapped
        return np.zeros(0, kind)
    return np.memmap(file, kind, mode="r", offset=offset, shape=(count,))


def _check_size(index: Path, wanted: int, what: str) -> None:
    size = index.stat().st_size
    if size != wanted:
        raise InputError(f"{index} speaks of {what}, which is {wanted} bytes, and is {size} bytes long: write it again")


def _listed(codes: dict[int, str]) -> str:
    return ", ".join(map(str, codes))
