"""`index.arrow`: all commit records of a cache in one Arrow IPC file, so that a remote cache opens with one request.

It is a copy that any process may make again (`write_index`); the records stay what counts. A reader takes it only where
its own digest holds and it is of this manifest, fetches the record itself where a shard is not what the index says, and,
where the records are at hand, compares them (`Index.is_current`).

    shard i32, path str, start i64, stop i64, rows i64, entries i64, objects str (JSON list of names, dictionary-coded),
    sizes list<i64>, sha256 binary (32 bytes an object), rest str (JSON: the record's other keys), seal binary[32]
    metadata: format, format_version, manifest (identity), content (SHA-256 over the columns)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stillroom.storage import strict
from stillroom.storage.commits import (
    COMMITS,
    CommitRecord,
    committed,
    load_record,
    parse_record,
    record_name,
    shards_named,
)
from stillroom.storage.depot import Depot, depot_at
from stillroom.storage.errors import FormatError, NotACacheError
from stillroom.storage.manifest import MANIFEST_NAME, Manifest

INDEX_NAME: Final = "index.arrow"
INDEX_FORMAT: Final = "stillroom-index"
INDEX_VERSION: Final = 1
MAX_INDEX_BYTES: Final = 1 << 30
_NAMES: Final = pa.dictionary(pa.int32(), pa.string())
_SCHEMA: Final = pa.schema(
    [
        ("shard", pa.int32()),
        ("path", pa.string()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("rows", pa.int64()),
        ("entries", pa.int64()),
        ("objects", _NAMES),
        ("sizes", pa.list_(pa.int64())),
        ("sha256", pa.binary()),
        ("rest", _NAMES),
        ("seal", pa.binary(32)),
    ]
)
_PLAIN: Final = ("shard", "path", "start", "stop", "rows", "entries")


@final
class Index:
    """The records of the shards a cache had when the index was written.

    Args:
        data: the file.
        manifest: of the cache.

    Raises:
        FormatError: damaged, of another manifest or of another version: make it again with `write_index`.
    """

    def __init__(self, data: pa.Buffer, manifest: Manifest) -> None:
        self._manifest = manifest
        try:
            with pa.ipc.open_file(pa.BufferReader(data)) as file:
                if file.schema != _SCHEMA:
                    raise FormatError(_wrong("has other columns"))
                self._table = file.read_all()
            self._table.validate(full=True)
            notes = {key.decode(): value.decode() for key, value in (self._table.schema.metadata or {}).items()}
            content = _digest(self._table)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise FormatError(_wrong(f"can not be read ({error})")) from error
        if notes.get("format") != INDEX_FORMAT or notes.get("format_version") != str(INDEX_VERSION):
            raise FormatError(_wrong(f"says {notes.get('format')!r} version {notes.get('format_version')!r}"))
        if notes.get("content") != content:
            raise FormatError(_wrong("is not what was written, its own checksum says"))
        if notes.get("manifest") != manifest.identity:
            raise FormatError(_wrong("is of another manifest.json"))
        shard_S = _integers(self._column("shard"))
        if np.any(np.diff(shard_S) <= 0) or (len(shard_S) and not 0 <= shard_S[0] <= shard_S[-1] < manifest.shards):
            raise FormatError(_wrong("does not name the shards of the plan"))
        self.shards: Final[npt.NDArray[np.int32]] = shard_S

    def record(self, shard: int) -> CommitRecord:
        """The record of a shard, checked as if it were read from its file.

        Raises:
            KeyError: the index does not hold it.
            DamagedError: it does not fit the manifest.
        """
        place = int(np.searchsorted(self.shards, shard))
        if place == len(self.shards) or self.shards[place] != shard:
            raise KeyError(shard)
        row: dict[str, Any] = {name: column[0].as_py() for name, column in zip(_SCHEMA.names, self._row(place))}
        hashes = row["sha256"].hex()
        objects = [
            {"name": name, "size_bytes": size, "sha256": hashes[64 * i : 64 * i + 64]}
            for i, (name, size) in enumerate(zip(json.loads(row["objects"]), row["sizes"]))
        ]
        data = {name: row[name] for name in _PLAIN} | {"objects": objects} | json.loads(row["rest"])
        return parse_record({**data, strict.SEAL: row["seal"].hex()}, self._manifest, shard)

    @property
    def entries(self) -> int:
        """Kept entries over all its shards."""
        return int(_integers(self._column("entries")).sum())

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest shard."""
        return int(np.add.reduceat(*self._sizes()).max()) if len(self.shards) else 0

    def bytes_by_object(self) -> dict[str, int]:
        """Bytes over all its shards, by name of the object within the shard."""
        totals: defaultdict[str, int] = defaultdict(int)
        names = self._column("objects")
        code_S = _integers(names.indices)
        size_K, start_S = self._sizes()
        for code, text in enumerate(names.dictionary.to_pylist()):
            objects = json.loads(text)
            size_SO = size_K[start_S[code_S == code][:, None] + np.arange(len(objects))]
            for name, total in zip(objects, size_SO.sum(0).tolist()):
                totals[name] += total
        return dict(totals)

    def _sizes(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Sizes of all objects of all shards, and where each shard's begin."""
        column = self._column("sizes")
        ends_S = _offsets(column)
        return _integers(column.flatten()), (ends_S[:-1] - ends_S[0]).astype(np.int64)

    def _column(self, name: str) -> pa.Array:
        return self._table[name].combine_chunks()

    def is_current(self, root: Path) -> bool:
        """Whether it says just what the records in `root` say; reads them all, parses none."""
        if set(self.shards.tolist()) != committed(root):
            return False
        for shard, seal in zip(self.shards.tolist(), self._table["seal"].to_pylist()):
            try:
                if seal.hex().encode() not in (root / record_name(shard)).read_bytes():
                    return False
            except OSError:
                return False
        return True

    def _row(self, place: int) -> list[Any]:
        return [self._table.column(name).slice(place, 1) for name in _SCHEMA.names]


def index_bytes(manifest: Manifest, records: list[CommitRecord]) -> bytes:
    """The file for these records."""
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    for record in sorted(records, key=lambda record: record.shard):
        data = record.to_json()
        columns["seal"].append(bytes.fromhex(data.pop(strict.SEAL)))
        for name in _PLAIN:
            columns[name].append(data.pop(name))
        objects = data.pop("objects")
        columns["objects"].append(json.dumps([item["name"] for item in objects]))
        columns["sizes"].append([item["size_bytes"] for item in objects])
        columns["sha256"].append(bytes.fromhex("".join(item["sha256"] for item in objects)))
        columns["rest"].append(json.dumps(data, sort_keys=True))
    arrays = [
        pa.array(columns[field.name], pa.string()).dictionary_encode().cast(_NAMES)
        if field.type == _NAMES
        else pa.array(columns[field.name], field.type)
        for field in _SCHEMA
    ]
    table = pa.Table.from_arrays(arrays, schema=_SCHEMA)
    notes = {
        "format": INDEX_FORMAT,
        "format_version": str(INDEX_VERSION),
        "manifest": manifest.identity,
        "content": _digest(table),
    }
    table = table.replace_schema_metadata(notes)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    return bytes(sink.getvalue())


def write_index(root: str | os.PathLike[str] | Depot) -> Path | str:
    """Write index.arrow of the cache at `root` from its records, whole or not at all. Any process may, any time.

    Returns its path or URL.

    Args:
        root: directory or URL of the cache, or its `Depot`.

    Raises:
        NotACacheError: there is no manifest.
        CacheError: a record is damaged.
    """
    depot = depot_at(root)
    try:
        manifest = Manifest.from_json(depot.read_json(MANIFEST_NAME))
    except FileNotFoundError:
        raise NotACacheError(f"{depot.name} holds no {MANIFEST_NAME}: name a cache") from None
    shards = sorted(shard for shard in shards_named(depot.names(COMMITS)) if shard < manifest.shards)
    records = _load_records(depot, manifest, shards)
    depot.replace(INDEX_NAME, index_bytes(manifest, records))
    return depot.root / INDEX_NAME if isinstance(depot.root, Path) else f"{depot.root}/{INDEX_NAME}"


def _load_records(depot: Depot, manifest: Manifest, shards: list[int]) -> list[CommitRecord]:
    if depot.readers == 1:
        return [load_record(depot, manifest, shard) for shard in shards]
    with ThreadPoolExecutor(depot.readers) as pool:
        return list(pool.map(lambda shard: load_record(depot, manifest, shard), shards))


def read_index(root: Path, manifest: Manifest) -> Index | None:
    """The index in directory `root` if it is there, whole, and says what the records say; else None."""
    try:
        if (root / INDEX_NAME).stat().st_size > MAX_INDEX_BYTES:
            return None
        index = Index(pa.memory_map(str(root / INDEX_NAME)).read_buffer(), manifest)
    except (OSError, FormatError):
        return None
    return index if index.is_current(root) else None


def _digest(table: pa.Table) -> str:
    """SHA-256 over the values, column by column; the same whatever wrote the file."""
    hasher = hashlib.sha256()

    def add(name: str, column: pa.Array) -> None:
        hasher.update(f"{name} {column.type} {len(column)} {column.null_count}\n".encode())
        if column.type == _NAMES:
            add("codes", column.indices)
            add("words", column.dictionary)
        elif pa.types.is_list(column.type):
            hasher.update(f"lengths int32 {len(column)} 0\n".encode())
            hasher.update(np.diff(_offsets(column)).astype("<i8").data)
            add("values", column.flatten())
        elif pa.types.is_integer(column.type):
            hasher.update(_integers(column).astype("<i8").data)
        elif pa.types.is_fixed_size_binary(column.type):
            width = column.type.byte_width
            hasher.update(np.full(len(column), width, "<i8").data)
            hasher.update(memoryview(column.buffers()[1])[width * column.offset :][: width * len(column)])
        else:
            ends_S = _offsets(column)
            hasher.update(np.diff(ends_S).astype("<i8").data)
            data = column.buffers()[2]
            hasher.update(b"" if data is None else memoryview(data)[ends_S[0] : ends_S[-1]])

    for name in _SCHEMA.names:
        add(name, table[name].combine_chunks())
    return hasher.hexdigest()


# As numpy, by hand: pyarrow's own conversions import pandas, which takes ten times as long as all the rest of opening.


def _integers(column: pa.Array) -> npt.NDArray[Any]:
    dtype = np.dtype(str(column.type))
    if not len(column):
        return np.zeros(0, dtype)
    return np.frombuffer(column.buffers()[1], dtype, len(column), column.offset * dtype.itemsize)


def _offsets(column: pa.Array) -> npt.NDArray[np.int32]:
    """Where the parts of a list, string or binary column begin, and where the last one ends."""
    if not len(column):
        return np.zeros(1, np.int32)
    return np.frombuffer(column.buffers()[1], np.int32, len(column) + 1, 4 * column.offset)


def _wrong(what: str) -> str:
    return f"{INDEX_NAME} {what}: delete it, it is only a copy of the records"
