"""Sources of text: files, folders and `datasets` names become one deterministic stream of documents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stillroom.pipeline.config import CorpusConfig
from stillroom.storage.errors import InputError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
TABLE_SUFFIXES = (".jsonl", ".ndjson", ".parquet")


def documents(config: CorpusConfig) -> Iterator[str]:
    """Texts of the corpus, non-empty, in an order that depends on names and contents alone.

    A text file is one document, a line of .jsonl or a row of .parquet another. Files of a folder come in sorted order.

    Raises:
        InputError: a source that is missing, unreadable, of an unknown kind, or without the text column.
    """
    path = Path(config.data).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES + TABLE_SUFFIXES and p.is_file())
        if not files:
            kinds = ", ".join(TEXT_SUFFIXES + TABLE_SUFFIXES)
            raise InputError(f"folder {path} holds no text: put {kinds} files in it or name another source")
        for file in files:
            yield from _file_documents(file, config.text_column)
    elif path.is_file():
        yield from _file_documents(path, config.text_column)
    elif path.suffix or len(path.parts) > 2 or config.data.startswith((".", "/", "~")):
        raise InputError(f"source {config.data} does not exist: name a file, a folder or a `datasets` dataset")
    else:
        yield from _dataset_documents(config)


def _file_documents(file: Path, column: str) -> Iterator[str]:
    try:
        if file.suffix in (".jsonl", ".ndjson"):
            yield from _jsonl_documents(file, column)
        elif file.suffix == ".parquet":
            yield from _parquet_documents(file, column)
        elif file.suffix in TEXT_SUFFIXES:
            text = file.read_text(encoding="utf-8")
            if text.strip():
                yield text
        else:
            kinds = ", ".join(TEXT_SUFFIXES + TABLE_SUFFIXES)
            raise InputError(f"{file} is of kind {file.suffix or 'none'}, wanted one of {kinds}: convert or rename it")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 at byte {error.start}: convert it to UTF-8") from error
    except OSError as error:
        raise InputError(f"{file} can not be read ({error.strerror or error}): check its permissions") from error


def _jsonl_documents(file: Path, column: str) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"line {number} of {file} is not JSON ({error.msg}): mend or remove it") from error
            if not isinstance(record, dict) or not isinstance(record.get(column), str):
                found = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
                raise InputError(
                    f"line {number} of {file} has no text in {column!r} (it has: {found}): name the right --text-column"
                )
            if record[column].strip():
                yield record[column]


def _parquet_documents(file: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{file} is not a Parquet file that can be read ({error}): write it again") from error
    _check_column(str(file), column, table.schema_arrow.names)
    for batch in table.iter_batches(columns=[column]):
        yield from _texts(str(file), column, batch.column(0).to_pylist())


def _dataset_documents(config: CorpusConfig) -> Iterator[str]:
    import datasets

    try:
        data = datasets.load_dataset(config.data, split=config.split)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"source {config.data} is neither a file nor a dataset that can be loaded ({reason}): "
            "check the name, the split and the network"
        ) from error
    _check_column(config.data, config.text_column, data.column_names)
    for batch in data.select_columns([config.text_column]).iter(batch_size=1000):
        yield from _texts(config.data, config.text_column, batch[config.text_column])


def _check_column(source: str, column: str, names: list[str]) -> None:
    if column not in names:
        raise InputError(f"{source} has no column {column!r} (it has: {', '.join(names)}): name one with --text-column")


def _texts(source: str, column: str, values: list[Any]) -> Iterator[str]:
    for value in values:
        if value is not None and not isinstance(value, str):
            raise InputError(f"column {column!r} of {source} holds {type(value).__name__}, wanted text: name another")
        if value and value.strip():
            yield value
