"""One file's documents: text, .jsonl, .parquet, Arrow and bins of ids; what a broken one says.

Shapes: `R` rows of a table, `E` token ids of all of them.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, final

import numpy as np

from stillroom.pipeline.corpus_bins import BIN_SUFFIXES, Ids, bin_documents
from stillroom.storage.errors import InputError

SUFFIXES: Final = {
    **dict.fromkeys((".txt", ".text", ".md", ".rst", ".py"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson"), "json"),
    ".parquet": "parquet",
    **dict.fromkeys((".arrow", ".feather"), "arrow"),
    **dict.fromkeys(BIN_SUFFIXES, "bins"),
}
MAX_ID: Final = 1 << 32

Messages: TypeAlias = list[dict[str, Any]]
Document: TypeAlias = str | Ids | Messages
Kind = Literal["text", "ids", "messages"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which column holds the documents, and what they are."""

    column: str
    kind: Kind = "text"

    @property
    def flag(self) -> str:
        """The option that names the column."""
        return f"--{self.kind}-column"

    @property
    def what(self) -> str:
        """What is looked for, in words."""
        return {"text": "text", "ids": "a list of token ids", "messages": "a list of chat messages"}[self.kind]


@final
class Tally:
    """What was left out so far: `skipped` broken records, of which `allowed` may be, and `empty` documents."""

    def __init__(self, allowed: int = 0) -> None:
        self.allowed = allowed
        self.skipped = 0
        self.empty = 0

    def bad(self, complaint: str, cause: Exception | None = None) -> None:
        """Count a broken record.

        Raises:
            InputError: it is one too many.
        """
        self.skipped += 1
        if self.skipped > self.allowed:
            more = f"; {self.allowed} before it were skipped" if self.allowed else ""
            raise InputError(f"{complaint}, or pass over it with --skip-bad{more}") from cause


def file_documents(file: Path, wanted: Wanted, tally: Tally) -> Iterator[Document]:
    """Documents of one file, by its suffix.

    Raises:
        InputError: a file that can not be read, of an unknown kind, or without the column; more broken records than allowed.
    """
    kind = SUFFIXES.get(file.suffix)
    if kind is None:
        raise InputError(
            f"{file} is of kind {file.suffix or 'none'}, wanted one of {', '.join(SUFFIXES)}: convert or rename it"
        )
    if kind == "text" and wanted.kind != "text":
        raise InputError(f"{file} is plain text and has no column {wanted.column!r}: drop {wanted.flag}")
    try:
        if kind == "json":
            yield from _json_documents(file, wanted, tally)
        elif kind == "text":
            yield from _text_documents(file, tally)
        elif kind == "bins":  # ids, whatever column is wanted of other files
            for ids in bin_documents(file):
                if len(ids):
                    yield ids
                else:
                    tally.empty += 1
        else:
            yield from _table_documents(file, kind, wanted, tally)
    except OSError as error:
        raise InputError(f"{file} can not be read ({error.strerror or error}): check its permissions") from error


def values_of(source: str, wanted: Wanted, values: Iterable[Any], tally: Tally) -> Iterator[Document]:
    """The documents among `values` of a column: None and empty ones are counted and left out.

    Raises:
        InputError: a value of another type.
    """
    for value in values:
        if value is None or len(value if hasattr(value, "__len__") else "x") == 0:
            tally.empty += 1
            continue
        document = as_document(value, wanted)
        if document is None:
            raise InputError(
                f"column {wanted.column!r} of {source} holds {_type_name(value)}, wanted {wanted.what}: name another"
            )
        if isinstance(document, str) and not document.strip():
            tally.empty += 1
        else:
            yield document


def as_document(value: Any, wanted: Wanted) -> Document | None:
    """`value` as the kind of document that is wanted; None if it is none."""
    if wanted.kind == "text":
        return value if isinstance(value, str) and value.isascii() | _is_utf8(value) else None
    if wanted.kind == "messages":
        ok = isinstance(value, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
        return value if ok else None
    try:
        ids = np.asarray(value)
    except ValueError:  # lists of several lengths
        return None
    ok = ids.ndim == 1 and (ids.dtype.kind in "iu" or ids.size == 0)
    return ids.astype(np.uint32) if ok and (ids.size == 0 or 0 <= ids.min() <= ids.max() < MAX_ID) else None


def check_column(source: str, wanted: Wanted, names: list[str]) -> None:
    """Refuse a table without the column.

    Raises:
        InputError: naming the columns there are.
    """
    if wanted.column not in names:
        raise InputError(
            f"{source} has no column {wanted.column!r} (it has: {', '.join(names)}): name one with {wanted.flag}"
        )


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False
    return True


def _type_name(value: Any) -> str:
    return "text that is not Unicode" if isinstance(value, str) else type(value).__name__


def _text_documents(file: Path, tally: Tally) -> Iterator[Document]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        tally.bad(f"{file} is not UTF-8 at byte {error.start}: convert it to UTF-8", error)
        return
    if text.strip():
        yield text
    else:
        tally.empty += 1


def _json_documents(file: Path, wanted: Wanted, tally: Tally) -> Iterator[Document]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
            except UnicodeDecodeError as error:
                tally.bad(f"line {number} of {file} is not UTF-8 at its byte {error.start}: convert it to UTF-8", error)
                continue
            except (json.JSONDecodeError, RecursionError) as error:
                reason = getattr(error, "msg", "nested too deeply")
                tally.bad(f"line {number} of {file} is not JSON ({reason}): mend or remove it", error)
                continue
            value = record.get(wanted.column) if isinstance(record, dict) else None
            if value in ("", []):
                tally.empty += 1
                continue
            document = as_document(value, wanted)
            if document is None:
                found = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
                complaint = f"line {number} of {file} has no {wanted.what.removeprefix('a ')} in {wanted.column!r}"
                tally.bad(f"{complaint} (it has: {found}): name the right {wanted.flag}")
            elif isinstance(document, str) and not document.strip():
                tally.empty += 1
            else:
                yield document


def _table_documents(file: Path, kind: str, wanted: Wanted, tally: Tally) -> Iterator[Document]:
    import pyarrow as pa

    try:
        for column in _columns(file, kind, wanted):
            column.validate(full=True)  # Arrow trusts what it maps: offsets and text are checked here
            if wanted.kind == "ids":
                yield from _ids_of(str(file), column, wanted, tally)
            else:
                yield from values_of(str(file), wanted, column.to_pylist(), tally)
    except pa.ArrowException as error:
        name = "a Parquet" if kind == "parquet" else "an Arrow"
        reason = str(error).splitlines()[0]
        raise InputError(f"{file} is not {name} file that can be read ({reason}): write it again") from error


def _columns(file: Path, kind: str, wanted: Wanted) -> Iterator[Any]:
    """The wanted column, a batch of rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == "parquet":
        with pq.ParquetFile(file) as table:
            check_column(str(file), wanted, table.schema_arrow.names)
            for batch in table.iter_batches(columns=[wanted.column]):
                yield batch.column(0)
        return
    with pa.memory_map(str(file)) as data:
        if data.size() >= 6 and data.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(data)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:  # what `datasets` writes
            data.seek(0)
            reader = pa.ipc.open_stream(data)
            batches = iter(reader)
        check_column(str(file), wanted, reader.schema.names)
        for batch in batches:
            yield batch.column(wanted.column)


def _ids_of(source: str, column: Any, wanted: Wanted, tally: Tally) -> Iterator[Ids]:
    """Rows of a list column, without a Python object per id."""
    import pyarrow as pa

    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not pa.types.is_integer(kind.value_type):
        raise InputError(f"column {wanted.column!r} of {source} holds {kind}, wanted {wanted.what}: name another")
    offsets = np.concatenate([[0], np.cumsum(np.asarray(column.value_lengths().fill_null(0)))]).astype(np.int64)
    values = column.flatten()  # what null rows hide is left out
    if values.null_count:
        raise InputError(f"column {wanted.column!r} of {source} holds a null among its ids: write it again")
    id_E = np.asarray(values)
    if len(id_E) and (id_E.min() < 0 or id_E.max() >= MAX_ID):
        raise InputError(
            f"column {wanted.column!r} of {source} holds ids from {id_E.min()} to {id_E.max()}, wanted 0 to {MAX_ID - 1}: "
            "name another"
        )
    id_E = id_E.astype(np.uint32)
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        if start == stop:
            tally.empty += 1
        else:
            yield id_E[start:stop]
