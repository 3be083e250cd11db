"""Data files of an export, read and written batch by batch: Parquet, Arrow IPC file, Arrow IPC stream.

Shapes: `B` sequences of a batch.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.storage.errors import CacheError, DamagedError, StillroomError
from stillroom.storage.files import sync_directory
from stillroom.storage.interchange.batch_in import check_schema
from stillroom.storage.interchange.plan import ExportPlan, columns
from stillroom.storage.invariants import most_entries
from stillroom.storage.manifest import Manifest
from stillroom.storage.raw import BLOCK_ROWS

ZSTD_LEVEL: Final = 1
STALE_S: Final = 86400.0
# Measured: a dictionary pays for all but these. Bytes apart shrink ids best; weights repeat and zstd finds it.
_SPLIT: Final = ("tokens", "ids")
_NO_DICTIONARY: Final = (*_SPLIT, "weights", "sequence", "digest")
_SLACK_BYTES: Final = 1 << 22  # page headers and dictionaries of a column chunk


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; what was written there takes its place, flushed, when the block ends well.

    Raises:
        OSError: the disk refused; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Delete temporary files that a killed export left more than a day ago."""
    for path in folder.glob(".*.tmp"):
        if time.time() - path.lstat().st_mtime > STALE_S:
            path.unlink(missing_ok=True)


def write_file(path: Path, plan: ExportPlan, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
    """Write a data file, whole or not at all.

    Raises:
        CacheError: the disk refused.
    """
    try:
        _write(path, plan, schema, batches)
    except StillroomError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise CacheError(
            f"{path} could not be written ({reason}): make room, then run it again; files before it are kept"
        ) from error


def _write(path: Path, plan: ExportPlan, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
    with replacing(path) as temporary:
        if plan.to == "parquet":
            split = {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in _SPLIT}
            dictionary = [f"{name}.list.element" for name in schema.names if name not in _NO_DICTIONARY]
            with pq.ParquetWriter(
                temporary, schema, compression="zstd", compression_level=ZSTD_LEVEL,
                use_dictionary=dictionary, column_encoding=split, write_page_checksum=True, write_statistics=False,
            ) as writer:  # fmt: skip
                for batch in batches:
                    writer.write_batch(batch, row_group_size=batch.num_rows)
            return
        opener = pa.ipc.new_file if plan.to == "arrow" else pa.ipc.new_stream
        with pa.OSFile(str(temporary), "wb") as sink, opener(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)


def read_schema(path: Path, plan: ExportPlan) -> pa.Schema:
    """Schema of a data file.

    Raises:
        DamagedError: it is missing or can not be opened.
    """
    with _guarded(path):
        if plan.to == "parquet":
            schema = pq.read_schema(path)
        else:
            with pa.memory_map(str(path)) as source:
                schema = (pa.ipc.open_file if plan.to == "arrow" else pa.ipc.open_stream)(source).schema
        schema.names  # noqa: B018  names are decoded when they are asked for: let what is no UTF-8 be found here
        return schema


def count_rows(path: Path, plan: ExportPlan) -> int:
    """Rows of a data file, without decoding them.

    Raises:
        DamagedError: it is missing, cut or damaged.
    """
    with _guarded(path):
        if plan.to == "parquet":
            return int(pq.read_metadata(path).num_rows)
        with pa.memory_map(str(path)) as source:
            return sum(batch.num_rows for batch in _ipc(source, plan))


def read_batches(path: Path, plan: ExportPlan) -> Iterator[pa.RecordBatch]:
    """Batches of a data file that may come from anyone, at most about `BLOCK_ROWS` token rows at a time.

    Raises:
        DamagedError: it is missing, cut or damaged, or claims sizes that the manifest does not allow.
        FormatError: its columns are not those of an export.
    """
    manifest = plan.manifest
    step = max(1, BLOCK_ROWS // manifest.packing.seq_len)
    with _guarded(path):
        if plan.to == "parquet":
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                check_schema(manifest, file.schema_arrow, path.name)
                _check_sizes(manifest, file.metadata, path)
                yield from file.iter_batches(batch_size=step, columns=list(columns(manifest)))
            return
        with pa.memory_map(str(path)) as source:
            for batch in _ipc(source, plan):
                check_schema(manifest, batch.schema, path.name)
                for start in range(0, batch.num_rows, step):
                    yield batch.slice(start, step)


def _ipc(source: Any, plan: ExportPlan) -> Iterator[pa.RecordBatch]:
    if plan.to == "arrow":
        reader = pa.ipc.open_file(source)
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)
    else:
        yield from pa.ipc.open_stream(source)


def _check_sizes(manifest: Manifest, metadata: pq.FileMetaData, path: Path) -> None:
    """Refuse a Parquet file that unfolds to more than its rows may hold, before any of it is unfolded."""
    most = max(manifest.packing.seq_len + 1, most_entries(manifest) * manifest.packing.seq_len)
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for index in range(group.num_columns):
            chunk = group.column(index)
            values = max(chunk.num_values, group.num_rows)
            if values > group.num_rows * most or chunk.total_uncompressed_size > 16 * values + _SLACK_BYTES:
                raise DamagedError(
                    f"{path.name}: column {chunk.path_in_schema} claims {chunk.num_values:,} values in "
                    f"{chunk.total_uncompressed_size:,} bytes for {group.num_rows} sequences, more than they can have"
                )


@contextmanager
def _guarded(path: Path) -> Iterator[None]:
    try:
        yield
    except StillroomError:
        raise
    except (pa.ArrowException, OSError, MemoryError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedError(f"{path.name} can not be read ({reason}): fetch or export it again") from error
