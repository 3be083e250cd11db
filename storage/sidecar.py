"""Files computed from a cache and kept beside it, in `derived/`: what they hold can be had again, so nothing relies on them.

One Arrow IPC file each: one row, whose columns are lists. Its metadata name the kind, the identity of the manifest and a
digest of the values; a reader takes a file only where all three hold. Storage, verify and the commit protocol ignore the
folder.

Shapes: `C` values of a column.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stillroom.storage.depot import Directory
from stillroom.storage.errors import FormatError
from stillroom.storage.manifest import Manifest

DERIVED: Final = "derived"
MAX_SIDECAR_BYTES: Final = 1 << 32
Columns = Mapping[str, npt.NDArray[Any]]

logger = logging.getLogger(__name__)


def pack(kind: str, manifest: Manifest, columns: Columns, notes: Mapping[str, str] | None = None) -> bytes:
    """The file that holds `columns`.

    Args:
        kind: name and version of what it is.
        manifest: of the cache it was computed from.
        columns: one-dimensional arrays of numbers, of any lengths.
        notes: further metadata.
    """
    arrays = []
    for column in columns.values():
        values = pa.Array.from_buffers(_type(column.dtype), len(column), [None, pa.py_buffer(column.tobytes())])
        arrays.append(pa.LargeListArray.from_arrays(pa.array([0, len(column)], pa.int64()), values))
    own = {"kind": kind, "manifest": manifest.identity, "content": _digest(columns)}
    table = pa.Table.from_arrays(arrays, names=list(columns)).replace_schema_metadata({**(notes or {}), **own})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    return bytes(sink.getvalue())


def unpack(
    path: Path, kind: str, manifest: Manifest, dtypes: Mapping[str, npt.DTypeLike]
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Columns and metadata of a file that `pack` made.

    Args:
        path: of the file.
        kind: what it must be.
        manifest: of the cache it must have been computed from.
        dtypes: of its columns.

    Raises:
        FileNotFoundError: there is none.
        FormatError: it is damaged, something else, or of another cache.
    """
    if path.is_symlink() or not path.is_file():
        if path.is_symlink() or path.exists():
            raise FormatError(f"{path} is no plain file: delete it")
        raise FileNotFoundError(path)
    try:
        if path.stat().st_size > MAX_SIDECAR_BYTES:
            raise FormatError(f"{path} holds more than {MAX_SIDECAR_BYTES:,} bytes: delete it")
        with pa.ipc.open_file(pa.BufferReader(path.read_bytes())) as file:
            wanted = {name: pa.large_list(_type(np.dtype(dtype))) for name, dtype in dtypes.items()}
            if dict(zip(file.schema.names, file.schema.types)) != wanted:
                raise FormatError(f"{path} has other columns than {', '.join(dtypes)}: delete it")
            table = file.read_all()
        table.validate(full=True)
        notes = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        if table.num_rows != 1:
            raise FormatError(f"{path} holds {table.num_rows} rows, wanted one: delete it")
        lists = {name: table[name].combine_chunks().flatten() for name in dtypes}
        columns = {name: _values(lists[name], np.dtype(dtype), path) for name, dtype in dtypes.items()}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} can not be read ({error}): delete it") from error
    if notes.get("kind") != kind or notes.get("manifest") != manifest.identity:
        raise FormatError(f"{path} is not of kind {kind!r}, or was computed from another cache: delete it")
    if notes.get("content") != _digest(columns):
        raise FormatError(f"{path} is not what was written, its own checksum says: delete it")
    return columns, notes


def keep(root: Path, name: str, data: bytes) -> bool:
    """Put a file into `derived/` of the directory `root`, whole or not at all; False, and a warning, where that can not be.

    A cache on a read-only disk is one to read from all the same.
    """
    depot = Directory(root)
    try:
        if (root / DERIVED).is_symlink():  # of a stranger's cache: it could lead anywhere
            raise PermissionError(f"{root / DERIVED} is a link")
        depot.prepare(DERIVED)
        depot.replace(f"{DERIVED}/{name}", data)
    except OSError as error:
        logger.warning("%s was not kept beside the cache (%s): it is computed again next time", name, error)
        return False
    return True


def _type(dtype: np.dtype[Any]) -> pa.DataType:
    return pa.from_numpy_dtype(dtype)


def _values(values: pa.Array, dtype: np.dtype[Any], path: Path) -> npt.NDArray[Any]:
    if values.null_count:
        raise FormatError(f"{path} lacks values: delete it")
    if not len(values):
        return np.zeros(0, dtype)
    return np.frombuffer(values.buffers()[1], dtype, len(values), values.offset * dtype.itemsize)


def _digest(columns: Columns) -> str:
    """SHA-256 over names, types and values."""
    hasher = hashlib.sha256()
    for name, column in columns.items():
        hasher.update(f"{name} {column.dtype.str} {len(column)}\n".encode())
        hasher.update(np.ascontiguousarray(column).data)
    return hasher.hexdigest()
