"""Two ways to the chunks of a committed shard: `direct` (memory map, the hot path) and `zarr` (zarr-python, the cross-check).

A reader's `chunk(name, i)` gives the padded elements of sequence i. Everything about a shard is checked against its
record before a byte is decoded: that each file is there, inside the cache, of the recorded size; for `direct` also the
CRC of each index, that its chunks tile the file, and the size a chunk unfolds to (so that a forged one can not ask for
gigabytes).

Shapes: `S` sequences of the shard.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, final

import numpy as np
import numpy.typing as npt

from stillroom.storage import strict
from stillroom.storage.chunks import decode_chunk
from stillroom.storage.commits import CommitRecord, damaged
from stillroom.storage.frames import LONGEST_HEADER, frame_head, read_index, unfolded_size, usual_head
from stillroom.storage.layout import ArraySpec, array_metadata, arrays_of
from stillroom.storage.manifest import Manifest

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
        self._whole: dict[str, npt.NDArray[Any]] = {}
        self._group = root / record.path
        inside = os.path.join(os.path.realpath(root), "shards", "")
        for item in record.objects:
            path = self._group / item.name
            try:
                found = os.stat(path)
                mode, size = found.st_mode, found.st_size
            except OSError as error:
                raise damaged(record.shard, f"{record.path}/{item.name} cannot be opened ({error.strerror})") from error
            if not stat.S_ISREG(mode):
                raise damaged(record.shard, f"{record.path}/{item.name} is not a file")
            if not os.path.realpath(path).startswith(inside):
                raise damaged(record.shard, f"{record.path}/{item.name} leads out of the cache")
            if size != item.size_bytes:
                raise damaged(
                    record.shard, f"{record.path}/{item.name} holds {size} bytes, its record says {item.size_bytes}"
                )

    def chunk_shape(self, array: ArraySpec) -> tuple[int, ...]:
        """Shape of one sequence's chunk of `array`."""
        return array.chunk_shape(self._seq_len, self.record.widths)

    def once(self, name: str, check: Callable[[npt.NDArray[Any]], None]) -> npt.NDArray[Any]:
        """The array `name`, which has one chunk for the whole shard, read and checked once.

        Raises:
            DamagedError: the bytes are not what they were, or `check` raises it.
        """
        if name not in self._whole:
            whole = self.chunk(name, 0)
            check(whole)
            self._whole[name] = whole
        return self._whole[name]

    @abstractmethod
    def chunk(self, name: str, sequence: int) -> npt.NDArray[Any]:
        """Padded elements of sequence `sequence` (counted within the shard) of array `name`.

        Raises:
            DamagedError: the bytes are not what they were.
        """


class Frame(NamedTuple):
    """One stored chunk: its bytes on disk, and what they unfold to."""

    data: memoryview
    nbytes: int
    elements: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class _Mapped(NamedTuple):
    map: mmap.mmap
    data: memoryview
    starts: list[int]
    head: bytes
    nbytes: int
    elements: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@final
class DirectReader(ShardReader):
    """Memory maps; each index is read and checked once."""

    def __init__(self, root: Path, manifest: Manifest, record: CommitRecord) -> None:
        super().__init__(root, manifest, record)
        self._open: dict[str, _Mapped] = {}

    def frame(self, name: str, sequence: int) -> Frame:
        """The stored chunk of `sequence` of array `name`, whose header has been seen to claim no more than it may.

        Raises:
            DamagedError: it claims another size.
        """
        mapped = self._open.get(name) or self._map(name)
        start, stop = mapped.starts[sequence], mapped.starts[sequence + 1]
        data = mapped.data[start:stop]
        # What this house writes begins with the same bytes each time; another's frame may be laid out otherwise.
        if (
            mapped.map[start : start + len(mapped.head)] != mapped.head
            and unfolded_size(bytes(data[:LONGEST_HEADER])) != mapped.nbytes
        ):
            raise damaged(
                self.record.shard,
                f"sequence {sequence} of {name} does not unfold to the {mapped.nbytes} bytes of its record",
            )
        return Frame(data, mapped.nbytes, mapped.elements, mapped.dtype, mapped.shape)

    def chunk(self, name: str, sequence: int) -> npt.NDArray[Any]:
        """As `ShardReader.chunk`."""
        frame = self.frame(name, sequence)
        try:
            elements = decode_chunk(self.arrays[name].codec, frame.data, frame.dtype, frame.elements)
        except ValueError as error:
            raise damaged(self.record.shard, f"sequence {sequence} of {name} does not decode ({error})") from error
        return elements if len(frame.shape) == 1 else elements.reshape(frame.shape)

    def _map(self, name: str) -> _Mapped:
        array, index = self.arrays[name], self.record.shard
        path = self._group / array.object_name
        try:
            index_S2 = read_index(path, array.chunks(self.record.sequences))
        except ValueError as error:
            raise damaged(index, f"{name} {error}") from error
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        shape = self.chunk_shape(array)
        count = math.prod(shape)
        nbytes = count * array.dtype.itemsize
        starts = [*index_S2[:, 0].tolist(), int(index_S2[:, 1].sum())]
        mapped = _Mapped(
            data,
            memoryview(data),
            starts,
            usual_head(nbytes) if array.codec == "zstd" else b"",
            nbytes,
            count,
            array.dtype,
            shape,
        )
        self._open[name] = mapped
        return mapped


@final
class ZarrReader(ShardReader):
    """Stock zarr-python over the same files. Ten times slower; its independence is its use."""

    def __init__(self, root: Path, manifest: Manifest, record: CommitRecord) -> None:
        super().__init__(root, manifest, record)
        self._zarr: dict[str, Any] = {}
        self._starts: dict[str, list[int]] = {}
        # zarr-python trusts what it opens, so it is only let near what we would have written (see `frames`).
        try:
            head = strict.load_file(self._group / "zarr.json")
        except (ValueError, OSError) as error:
            raise damaged(record.shard, str(error)) from error
        if head.keys() != {"zarr_format", "node_type", "attributes"}:  # a consolidated copy would hide the arrays' own
            raise damaged(record.shard, f"the zarr.json of its group has the keys {', '.join(sorted(head))!r}")
        for name, array in self.arrays.items():
            wanted = array_metadata(array, record.sequences, self.chunk_shape(array))
            try:
                came = strict.load_file(self._group / name / "zarr.json")
                index_S2 = read_index(self._group / array.object_name, array.chunks(record.sequences))
            except (ValueError, OSError) as error:
                raise damaged(record.shard, f"array {name} {error}") from error
            if foreign := [key for key in wanted.keys() | came.keys() if wanted.get(key) != came.get(key)]:
                raise damaged(
                    record.shard, f"the zarr.json of array {name} has another {sorted(foreign)[0]} than its record"
                )
            self._starts[name] = index_S2[:, 0].tolist()
        import zarr  # a quarter of a second, which the hot path need not spend

        try:
            group = zarr.open_group(self._group, mode="r")
            for name in self.arrays:
                self._zarr[name] = group[name]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise damaged(record.shard, f"zarr cannot open it ({error})") from error

    def chunk(self, name: str, sequence: int) -> npt.NDArray[Any]:
        """As `ShardReader.chunk`."""
        array = self.arrays[name]
        head = frame_head(self._group / array.object_name, self._starts[name][sequence])
        wanted = math.prod(self.chunk_shape(array)) * array.dtype.itemsize
        if array.codec == "zstd" and unfolded_size(head) != wanted:
            raise damaged(
                self.record.shard, f"sequence {sequence} of {name} does not unfold to the {wanted} bytes of its record"
            )
        try:
            return np.asarray(self._zarr[name][sequence])
        except (ValueError, RuntimeError, OSError) as error:
            raise damaged(self.record.shard, f"sequence {sequence} of {name} does not decode ({error})") from error


READERS: Final[dict[str, type[ShardReader]]] = {"direct": DirectReader, "zarr": ZarrReader}
