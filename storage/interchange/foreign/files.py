"""Files of other tools, read a few sequences at a time: Parquet, Arrow IPC (file or stream), JSON lines.

A file may come from a stranger: nothing in it is executed, arrays are validated, a column of another type is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.storage.errors import InputError, StillroomError

SUFFIXES: Final = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow", ".jsonl": "jsonl", ".ndjson": "jsonl"}
Columns = dict[str, pa.Array]
_BYTES: Final = 1 << 24  # unfolded, in one batch
_BUFFER: Final = 1 << 20
_LINE_BYTES: Final = 1 << 28
_MOST_ROWS: Final = 4096


def find_files(source: Path) -> tuple[Path, ...]:
    """The data files of a dataset, in the order of the numbers in their names.

    Args:
        source: one file, or a folder that holds files of one kind (or whose `data/` does).

    Raises:
        InputError: there are none, or of several kinds.
    """
    if source.is_file():
        if source.suffix not in SUFFIXES:
            raise InputError(f"{source} is of no kind that can be imported: wanted {', '.join(SUFFIXES)}")
        return (source,)
    for folder in (source, source / "data"):
        # `cache-*.arrow` is what `datasets` computed, not the data.
        found = [
            p for p in folder.glob("*") if p.suffix in SUFFIXES and p.is_file() and not p.name.startswith("cache-")
        ]
        if len({SUFFIXES[path.suffix] for path in found}) > 1:
            raise InputError(f"{folder} holds data files of several kinds: name one file, or sort them into folders")
        if found:
            return tuple(sorted(found, key=_by_number))
    raise InputError(f"{source} holds no data file: wanted one, or a folder of {', '.join(SUFFIXES)}")


def _by_number(path: Path) -> list[tuple[int, str]]:
    """`data_10` after `data_9`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def content_digest(files: tuple[Path, ...], settings: Mapping[str, Any]) -> str:
    """SHA-256 over how the files are read and over their bytes; their names play no part.

    Raises:
        InputError: a file can not be read.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, allow_nan=False).encode())
    for path in files:
        with _guarded(path), path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def column_names(path: Path) -> list[str]:
    """Names of a file's columns; of JSON lines, the keys of the first.

    Raises:
        InputError: it can not be read.
    """
    with _guarded(path):
        kind = SUFFIXES[path.suffix]
        if kind == "parquet":
            return list(pq.read_schema(path).names)
        if kind == "arrow":
            with pa.memory_map(str(path)) as source:
                return list(_opened(source).schema.names)
        for line in _lines(path):
            return list(_object(line, path, 0))
        return []


def read_columns(path: Path, wanted: Mapping[str, pa.DataType]) -> Iterator[Columns]:
    """Columns of a file, cast to the types wanted, some rows at a time.

    Raises:
        InputError: it can not be read, or a column is missing or of another kind.
    """
    names = column_names(path)
    for name in wanted:
        if names.count(name) != 1:
            there = ", ".join(sorted(set(names))[:12]) or "none"
            what = "holds no" if name not in names else "holds more than one"
            raise InputError(f"{path.name} {what} column {name!r}: name another of its columns ({there})")
    with _guarded(path):
        kind = SUFFIXES[path.suffix]
        if kind == "jsonl":
            yield from _json_columns(path, wanted)
        elif kind == "parquet":
            # Buffered ahead, it would hold every row group it has read; with a buffer size it reads a column piece by piece.
            with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER, page_checksum_verification=True) as file:
                for batch in file.iter_batches(batch_size=_step(file.metadata), columns=list(wanted)):
                    yield _cast(path, batch, wanted)
        else:
            with pa.memory_map(str(path)) as source:
                for whole in _ipc_batches(source):
                    batch = whole.select(list(wanted))
                    batch.validate(full=True)  # first: even its size is read off offsets that may be wild
                    step = max(1, min(_MOST_ROWS, _BYTES * batch.num_rows // max(batch.nbytes, 1)))
                    for start in range(0, batch.num_rows, step):
                        yield _cast(path, batch.slice(start, step), wanted)


def _step(metadata: pq.FileMetaData) -> int:
    """Rows of a Parquet file in one batch, so that a batch does not get large.

    (Only figures of row groups: where those of a column are damaged, asking for them ends the process.)
    """
    most = 1
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        most = max(most, group.total_byte_size // max(group.num_rows, 1))
    return max(1, min(_MOST_ROWS, _BYTES // most))


def _opened(source: Any) -> Any:
    try:
        return pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source)


def _ipc_batches(source: Any) -> Iterator[pa.RecordBatch]:
    reader = _opened(source)
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)
    else:
        yield from reader


def _cast(path: Path, batch: pa.RecordBatch, wanted: Mapping[str, pa.DataType]) -> Columns:
    found = {}
    for name, kind in wanted.items():
        column = batch.column(name)
        column.validate(full=True)
        try:
            found[name] = column.cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise InputError(
                f"{path.name} has the column {name!r} as {column.type}, wanted what reads as {kind} "
                f"({_first_line(error)}): name another column, or another --from"
            ) from error
    return found


def _json_columns(path: Path, wanted: Mapping[str, pa.DataType]) -> Iterator[Columns]:
    rows: list[dict[str, Any]] = []
    size, done = 0, 0
    for number, line in enumerate(_lines(path)):
        row = _object(line, path, number)
        for name in wanted:
            if name not in row:
                raise InputError(f"{path.name}, line {number + 1}: lacks the key {name!r}: every line needs it")
        rows.append(row)
        size += len(line)
        if size > _BYTES or len(rows) == _MOST_ROWS:
            yield {name: _from_json(path, rows, name, kind, done) for name, kind in wanted.items()}
            done, size, rows = number + 1, 0, []
    if rows:
        yield {name: _from_json(path, rows, name, kind, done) for name, kind in wanted.items()}


def _from_json(path: Path, rows: list[dict[str, Any]], name: str, kind: pa.DataType, first: int) -> pa.Array:
    try:
        return pa.array([row[name] for row in rows], kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        for number, row in enumerate(rows):  # which line it is
            try:
                pa.array([row[name]], kind)
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as its_own:
                raise InputError(
                    f"{path.name}, line {first + number + 1}: {name!r} does not read as {kind} ({_first_line(its_own)}): "
                    "mend it, or name another key"
                ) from error
        raise


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while line := file.readline(_LINE_BYTES + 1):
            if len(line) > _LINE_BYTES:
                raise InputError(
                    f"{path.name} has a line of more than {_LINE_BYTES:,} bytes: cut its sequences shorter"
                )
            if line.strip():
                yield line


def _object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path.name}, line {number + 1}: is no JSON ({error}): wanted one object a line") from error
    if not isinstance(row, dict):
        raise InputError(f"{path.name}, line {number + 1}: holds {type(row).__name__}, wanted one object a line")
    return row


@contextmanager
def _guarded(path: Path) -> Iterator[None]:
    try:
        yield
    except StillroomError:
        raise
    except (pa.ArrowException, OSError, MemoryError, ValueError) as error:
        raise InputError(f"{path} can not be read ({_first_line(error)}): fetch it again") from error


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
