"""Two ways to the chunks of a committed shard: `direct` (memory map, the hot path) and `zarr` (zarr-python, the cross-check).

A reader's `chunk(name, i)` gives the padded elements of sequence i. Everything about a shard is checked against its
record before a byte is decoded: that each file is there, inside the cache, of the recorded size; for `direct` also the
CRC of each index, that its chunks tile the file, and the size a chunk unfolds to (so that a forged one can not ask for
gigabytes).

Shapes: `S` sequences of the shard.
"""

from __future__ import annotations

import mmap
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Final, Literal, final

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import zarr

from stillroom.storage.commits import CommitRecord, damaged
from stillroom.storage.layout import ArraySpec, arrays_of
from stillroom.storage.manifest import Manifest
from stillroom.storage.shard import INDEX_CRC_BYTES, INDEX_ENTRY_BYTES

ReaderName = Literal["direct", "zarr"]


class ShardReader(ABC):
    """One open shard.

    Args:
        root: directory of the cache.
        manifest: of the cache.
        record: of the shard.

    Raises:
        DamagedError: a file is missing, outside the cache, or not of the recorded size.
    """

    def __init__(self, root: Path, manifest: Manifest, record: CommitRecord) -> None:
        self.record = record
        self.arrays: Final = {array.name: array for array in arrays_of(manifest)}
        self._seq_len = manifest.packing.seq_len
        self._group = root / record.path
        inside = os.path.realpath(root / "shards") + os.sep
        for item in record.objects:
            path = self._group / item.name
            try:
                size = os.stat(path).st_size
            except OSError as error:
                raise damaged(record.shard, f"{record.path}/{item.name} cannot be opened ({error.strerror})") from error
            if not os.path.realpath(path).startswith(inside):
                raise damaged(record.shard, f"{record.path}/{item.name} leads out of the cache")
            if size != item.size_bytes:
                raise damaged(
                    record.shard, f"{record.path}/{item.name} holds {size} bytes, its record says {item.size_bytes}"
                )

    def chunk_shape(self, array: ArraySpec) -> tuple[int, ...]:
        """Shape of one sequence's chunk of `array`."""
        return array.chunk_shape(self._seq_len, self.record.widths)

    @abstractmethod
    def chunk(self, name: str, sequence: int) -> npt.NDArray[Any]:
        """Padded elements of sequence `sequence` (counted within the shard) of array `name`.

        Raises:
            DamagedError: the bytes are not what they were.
        """


@final
class DirectReader(ShardReader):
    """Memory maps; each index is read and checked once."""

    def __init__(self, root: Path, manifest: Manifest, record: CommitRecord) -> None:
        super().__init__(root, manifest, record)
        self._codec = pa.Codec("zstd")
        self._open: dict[str, tuple[pa.Buffer, list[int], list[int], int, np.dtype[Any], tuple[int, ...]]] = {}

    def chunk(self, name: str, sequence: int) -> npt.NDArray[Any]:
        """As `ShardReader.chunk`."""
        buffer, starts, sizes, nbytes, dtype, shape = self._open.get(name) or self._map(name)
        try:
            # Decodes into exactly `nbytes`: a frame that unfolds to more or less is an error, not an allocation.
            data = self._codec.decompress(buffer.slice(starts[sequence], sizes[sequence]), nbytes)
        except (OSError, pa.ArrowException) as error:
            raise damaged(self.record.shard, f"sequence {sequence} of {name} does not decode ({error})") from error
        elements: npt.NDArray[Any] = np.frombuffer(data, dtype)
        return elements if len(shape) == 1 else elements.reshape(shape)

    def _map(self, name: str) -> tuple[pa.Buffer, list[int], list[int], int, np.dtype[Any], tuple[int, ...]]:
        array, index = self.arrays[name], self.record.shard
        with (self._group / array.object_name).open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        index_start = len(data) - INDEX_CRC_BYTES - INDEX_ENTRY_BYTES * self.record.sequences
        if index_start < 0:
            raise damaged(index, f"{name} is too short for its index")
        table, crc = data[index_start:-INDEX_CRC_BYTES], data[-INDEX_CRC_BYTES:]
        if google_crc32c.value(table) != int.from_bytes(crc, "little"):
            raise damaged(index, f"the index of {name} fails its checksum")
        index_S2 = np.frombuffer(table, "<u8").reshape(-1, 2)
        sizes_S = index_S2[:, 1]
        # Chunks lie back to back and fill the file: no hole, no overlap, none missing (which Zarr would read as zeros).
        if (
            np.any(sizes_S - np.uint64(1) >= np.uint64(max(index_start, 1)))
            or np.any(index_S2[:, 0] != np.cumsum(sizes_S) - sizes_S)
            or int(sizes_S.sum()) != index_start
        ):
            raise damaged(index, f"the index of {name} does not fit its file")
        shape = self.chunk_shape(array)
        nbytes = int(np.prod(shape)) * array.dtype.itemsize
        entry = (pa.py_buffer(data), index_S2[:, 0].tolist(), sizes_S.tolist(), nbytes, array.dtype, shape)
        self._open[name] = entry
        return entry


@final
class ZarrReader(ShardReader):
    """Stock zarr-python over the same files. Ten times slower; its independence is its use."""

    def __init__(self, root: Path, manifest: Manifest, record: CommitRecord) -> None:
        super().__init__(root, manifest, record)
        self._zarr: dict[str, Any] = {}
        try:
            group = zarr.open_group(self._group, mode="r")
            for name, array in self.arrays.items():
                self._zarr[name] = group[name]
                came = (self._zarr[name].shape, self._zarr[name].dtype)
                wanted = ((record.sequences, *self.chunk_shape(array)), array.dtype)
                if came != wanted:
                    raise damaged(record.shard, f"array {name} is {came}, its record says {wanted}")
        except (ValueError, KeyError) as error:
            raise damaged(record.shard, f"zarr cannot open it ({error})") from error

    def chunk(self, name: str, sequence: int) -> npt.NDArray[Any]:
        """As `ShardReader.chunk`."""
        try:
            return np.asarray(self._zarr[name][sequence])
        except (ValueError, RuntimeError, OSError) as error:
            raise damaged(self.record.shard, f"sequence {sequence} of {name} does not decode ({error})") from error


READERS: Final[dict[str, type[ShardReader]]] = {"direct": DirectReader, "zarr": ZarrReader}
