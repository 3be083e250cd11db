"""What a shard object says of itself before anything in it is decoded: its index, and the size a Zstandard frame unfolds to.

For the readers that hand the bytes to a library which trusts them: zarr-python reads zeros where an index names a chunk
that is not there, and makes room for as much as a frame claims.

Shapes: `S` sequences (chunks) of the object.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import google_crc32c
import numpy as np
import numpy.typing as npt

INDEX_ENTRY_BYTES: Final = 16  # offset and length, both u64
INDEX_CRC_BYTES: Final = 4
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
LONGEST_HEADER: Final = 18


def read_index(path: Path, sequences: int) -> npt.NDArray[np.uint64]:
    """Offset and length of every chunk of a shard object, `[S, 2]`.

    Raises:
        ValueError: the object is too short, the index fails its checksum, or its chunks do not tile the object.
    """
    with path.open("rb") as file:
        index_start = os.fstat(file.fileno()).st_size - INDEX_CRC_BYTES - INDEX_ENTRY_BYTES * sequences
        if index_start < 0:
            raise ValueError("is too short for its index")
        file.seek(index_start)
        data = file.read()
    table, crc = data[:-INDEX_CRC_BYTES], data[-INDEX_CRC_BYTES:]
    if google_crc32c.value(table) != int.from_bytes(crc, "little"):
        raise ValueError("has an index that fails its checksum")
    index_S2 = np.frombuffer(table, "<u8").reshape(-1, 2)
    if not tiles(index_S2, index_start):
        raise ValueError("has an index that does not fit it")
    return index_S2


def tiles(index_S2: npt.NDArray[np.uint64], size: int) -> bool:
    """Do the chunks lie back to back and fill `size` bytes: no hole, no overlap, none missing, none empty?"""
    sizes_S = index_S2[:, 1]
    return bool(
        np.all(sizes_S - np.uint64(1) < np.uint64(max(size, 1)))
        and np.all(index_S2[:, 0] == np.cumsum(sizes_S) - sizes_S)
        and int(sizes_S.sum()) == size
    )


def unfolded_size(frame: bytes) -> int | None:
    """Bytes a Zstandard frame says it unfolds to (RFC 8878, 3.1.1.1); None where it does not say, or is no frame."""
    if frame[:4] != _ZSTD_MAGIC or len(frame) < 6:
        return None
    flags = frame[4]
    single = flags >> 5 & 1
    start = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
    width = (single, 2, 4, 8)[flags >> 6]
    field = frame[start : start + width]
    if not width or len(field) < width:
        return None
    return int.from_bytes(field, "little") + (256 if width == 2 else 0)


def usual_head(size: int) -> bytes:
    """First bytes of a frame of `size` bytes as libzstd writes it: content size and checksum flags set, one segment."""
    if size < 256:
        return _ZSTD_MAGIC + b"\x24" + size.to_bytes(1, "little")
    if size < 256 + (1 << 16):
        return _ZSTD_MAGIC + b"\x64" + (size - 256).to_bytes(2, "little")
    return _ZSTD_MAGIC + b"\xa4" + size.to_bytes(4, "little")


def frame_head(path: Path, start: int) -> bytes:
    """The bytes at `start` that hold the whole header of a frame."""
    with path.open("rb") as file:
        file.seek(start)
        return file.read(LONGEST_HEADER)
