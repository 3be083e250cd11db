"""Commit records: commits/NNNNNN.json says a shard is whole and where its bytes are. Readers go only through records.

    1. write the shard under shards/NNNNNN-<attempt>.zarr, a name never used before, and flush it to the disk
    2. put commits/NNNNNN.json, which fails if another writer was first; the loser deletes its attempt

A kill at any point leaves either no record (an orphan attempt, collected later) or a whole shard.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Protocol

from stillroom.storage import strict
from stillroom.storage.errors import CacheError, DamagedError, FormatError
from stillroom.storage.layout import Widths, arrays_of, widest
from stillroom.storage.manifest import FORMAT_VERSION, Manifest

COMMITS: Final = "commits"
SHARDS: Final = "shards"
_RECORD_NAME: Final = re.compile(r"(\d{6,12})\.json")
_SHARD_PATH: Final = re.compile(r"shards/(\d{6,12})-[0-9a-f]{8,32}\.zarr")
FREE_CHUNK_BYTES: Final = 1 << 24  # a chunk of at most this is decoded whatever its shard weighs ...
MAX_UNFOLDING: Final = 256  # ... a larger one only from a shard that weighs a 256th of it
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


def damaged(index: int, what: str) -> DamagedError:
    """The error for a shard whose bytes are not what its record says, with the remedy."""
    error = DamagedError(
        f"shard {index}: {what}; delete {COMMITS}/{index:06d}.json and run `stillroom cache` again: "
        "only that shard is recomputed"
    )
    error.what = what
    return error


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """One file of a shard: name relative to the shard's group, size and hash."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRecord:
    """What a committed shard holds.

    Attributes:
        shard: its index.
        path: its group, relative to the cache.
        start, stop: its sequences.
        rows, entries: how many rows and kept entries it holds.
        widths: padded widths of its ragged runs (`entry` is the cap of the ids).
        objects: its files.
        libraries: versions that wrote it.
        manifest: `Manifest.identity` of the cache it belongs to.
        format_version: of the cache format.
    """

    shard: int
    path: str
    start: int
    stop: int
    rows: int
    entries: int
    widths: Widths
    objects: tuple[ObjectInfo, ...]
    libraries: dict[str, str]
    manifest: str
    format_version: int = FORMAT_VERSION

    @property
    def sequences(self) -> int:
        """Number of sequences of the shard."""
        return self.stop - self.start

    @property
    def size_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(item.size_bytes for item in self.objects)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON object, sealed with its own digest."""
        return strict.sealed(self.plain())

    def plain(self) -> dict[str, Any]:
        """The same without the seal: `asdict`, which copies deeply and takes ten times as long, by hand."""
        data = {name: getattr(self, name) for name in _FIELDS}
        data["widths"] = asdict(self.widths)
        data["objects"] = tuple(
            {"name": item.name, "size_bytes": item.size_bytes, "sha256": item.sha256} for item in self.objects
        )
        return data


_FIELDS: Final = tuple(item.name for item in fields(CommitRecord))


def record_name(index: int) -> str:
    """Path of the record of shard `index` relative to the cache."""
    return f"{COMMITS}/{index:06d}.json"


def shards_named(names: Iterable[str]) -> set[int]:
    """Indices of the shards whose records have these names; others are passed over."""
    return {int(match[1]) for name in names if (match := _RECORD_NAME.fullmatch(name))}


def committed(root: Path) -> set[int]:
    """Indices of the shards that have a record.

    Raises:
        CacheError: the directory of records is missing.
    """
    try:
        return shards_named(os.listdir(root / COMMITS))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheError(f"{root} has no {COMMITS}/ directory: copy the whole cache, records included") from error


class JsonSource(Protocol):
    """What records can be read from: a `Depot`, a `Place`."""

    def read_json(self, path: str) -> dict[str, Any]:
        """The JSON object at `path`, or FileNotFoundError, or FormatError."""


def load_record(source: Path | JsonSource, manifest: Manifest, index: int) -> CommitRecord:
    """The record of shard `index`, checked against the manifest before anything is opened or allocated.

    Args:
        source: directory of the cache, or what reads from where it is.
        manifest: of the cache.
        index: of the shard.

    Raises:
        DamagedError: the record is missing, malformed, or does not belong to this manifest.
        FormatError: a newer version wrote it.
        CacheError: a store that kept failing.
    """
    record = find_record(source, manifest, index)
    if record is None:
        raise DamagedError(f"shard {index} has no record: run `stillroom cache` again to make it")
    return record


def find_record(source: Path | JsonSource, manifest: Manifest, index: int) -> CommitRecord | None:
    """As `load_record`, but None where there is no record."""
    name = record_name(index)
    try:
        data = strict.load_file(source / name) if isinstance(source, Path) else source.read_json(name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except FormatError as error:
        raise damaged(index, str(error)) from error
    return parse_record(data, manifest, index)


def parse_record(data: dict[str, Any], manifest: Manifest, index: int) -> CommitRecord:
    """The record of shard `index` from its JSON object, checked as `load_record` does.

    Raises:
        DamagedError: the record is malformed, or does not belong to this manifest.
        FormatError: a newer version wrote it.
    """
    version = data.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise FormatError(
            f"{record_name(index)} has format_version {version}, this stillroom reads version {FORMAT_VERSION}: "
            "upgrade stillroom"
        )
    try:
        record = strict.from_json(CommitRecord, strict.unsealed(data, record_name(index)), record_name(index))
    except FormatError as error:
        raise damaged(index, str(error)) from error
    if problem := _problem(record, manifest, index):
        raise damaged(index, f"its record {problem}")
    return record


def _problem(record: CommitRecord, manifest: Manifest, index: int) -> str | None:
    match = _SHARD_PATH.fullmatch(record.path)
    expected, arrays = {"zarr.json"}, arrays_of(manifest)
    for array in arrays:
        expected |= {f"{array.name}/zarr.json", array.object_name}
    limit = widest(manifest.sampler, manifest.packing.seq_len)
    widths = (record.widths.entry, record.widths.head, record.widths.tail)
    if match is None or int(match[1]) != index or record.shard != index:
        return f"names shard {record.shard} at {record.path!r}, which is not its own"
    if record.manifest != manifest.identity:
        return "belongs to a cache with another manifest.json"
    if (record.start, record.stop) != manifest.shard_range(index):
        return f"covers sequences {record.start} to {record.stop}, the plan says {manifest.shard_range(index)}"
    if record.rows != record.sequences * manifest.packing.seq_len:
        return f"counts {record.rows} rows in {record.sequences} sequences"
    if any(width % 8 or not 8 <= width <= limit for width in widths):
        return f"has widths {widths}, wanted multiples of 8 up to {limit}"
    if not 0 <= record.entries <= record.sequences * record.widths.entry:
        return f"counts {record.entries} entries"
    if sorted(item.name for item in record.objects) != sorted(expected):
        return "does not list the objects of this format"
    unfolded = max(
        math.prod(array.chunk_shape(manifest.packing.seq_len, record.widths)) * array.dtype.itemsize for array in arrays
    )
    if unfolded > max(FREE_CHUNK_BYTES, MAX_UNFOLDING * record.size_bytes):
        return f"lets a chunk of {unfolded:,} bytes unfold from a shard of {record.size_bytes:,}"
    if any(item.size_bytes < 1 or not _SHA256.fullmatch(item.sha256) for item in record.objects):
        return "has an impossible size or hash"
    return None
