"""`export_cache`: a complete cache to a folder that pyarrow and `datasets` open as it is."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from stillroom.storage import strict
from stillroom.storage.cache import Cache, open_cache
from stillroom.storage.commits import damaged
from stillroom.storage.errors import DamagedError, InputError, PlanMismatchError
from stillroom.storage.files import put_if_absent
from stillroom.storage.interchange.batch_out import to_batch
from stillroom.storage.interchange.files import count_rows, read_schema, replacing, sweep, write_file
from stillroom.storage.interchange.plan import (
    PLAN_NAME,
    ExportPlan,
    To,
    file_about,
    file_schema,
    fingerprint,
    readme,
    shard_digest,
)
from stillroom.storage.interchange.tokenizer import copy_tokenizer
from stillroom.storage.raw import blocks_of, read_block
from stillroom.storage.readers import DirectReader

FILE_BYTES: Final = 256 << 20  # of the cache, in one data file
MOST_FILES: Final = 9_000  # in the folder of data files: hubs ask for fewer than 10,000 in one


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """What `export_cache` did.

    Attributes:
        out: the folder; to: its kind.
        files: data files in it, `files_before` of them were there already.
        sequences, rows: in the whole export.
        size_bytes: of the data files.
        seconds: it took.
    """

    out: str
    to: To
    files: int
    files_before: int
    sequences: int
    rows: int
    size_bytes: int
    seconds: float

    @property
    def already_done(self) -> bool:
        """Whether there was nothing to do."""
        return self.files == self.files_before


def export_cache(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: To = "parquet",
    shards_per_file: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ExportResult:
    """Write a cache as rows for other tools; called again it goes on where it stopped.

    Args:
        path: directory of a complete cache.
        out: folder of the export: new, empty, or of the same export.
        to: `parquet` or `arrow` (data/train-*, opened by `load_dataset(out)`), or `datasets` (`load_from_disk(out)`).
        shards_per_file: shards in one data file; None takes about 256 MB of the cache, or what an export begun has.
        on_progress: told how many of the shards are written.

    Raises:
        CacheError: the cache is incomplete.
        DamagedError: one of its shards is damaged.
        PlanMismatchError: the folder holds the export of another cache, or of another kind.
        InputError: the folder holds something else, or an option does not fit.
    """
    started, folder, cache = time.monotonic(), Path(out), open_cache(path)
    plan = _plan(cache, folder, to, shards_per_file)
    missing = [number for number in range(plan.files) if not _is_there(cache, folder, plan, number)]
    shards = sum(len(plan.shards(number)) for number in missing)
    done = 0

    def batches(number: int, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        nonlocal done
        for shard in plan.shards(number):
            yield from _shard_batches(cache, shard, schema)
            done += 1
            on_progress(done, shards)

    for number in missing:
        schema = _schema(cache, plan, number)
        write_file(folder / plan.file_name(number), plan, schema, batches(number, schema))
    _finish(cache, folder, plan)
    return ExportResult(
        out=str(folder),
        to=plan.to,
        files=plan.files,
        files_before=plan.files - len(missing),
        sequences=len(cache),
        rows=len(cache) * cache.manifest.packing.seq_len,
        size_bytes=sum((folder / plan.file_name(number)).stat().st_size for number in range(plan.files)),
        seconds=time.monotonic() - started,
    )


def default_shards_per_file(mean_bytes: float, shards: int) -> int:
    """Shards in a data file where nothing is said: about 256 MB of the cache, more where that would be too many files."""
    return min(max(1, round(FILE_BYTES / max(mean_bytes, 1)), -(-shards // MOST_FILES)), shards)


def _plan(cache: Cache, folder: Path, to: To, shards_per_file: int | None) -> ExportPlan:
    """The plan of a new export, or of the one begun in `folder` if it is the same."""
    mean_bytes = sum(cache.record(shard).size_bytes for shard in cache.shards) / max(len(cache.shards), 1)
    default = default_shards_per_file(mean_bytes, cache.manifest.shards)
    plan = ExportPlan(to=to, shards_per_file=shards_per_file or default, manifest=cache.manifest)
    if folder.is_dir() and not (folder / PLAN_NAME).is_file() and any(folder.iterdir()):
        raise InputError(f"{folder} holds other files and no export: choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    put_if_absent(folder / PLAN_NAME, strict.dumps(plan.to_json()).encode())
    begun = ExportPlan.load(folder)
    differences = begun.manifest.differences(cache.manifest)
    if begun.to != to:
        differences.append(f"to: {begun.to}, now {to}")
    if shards_per_file not in (None, begun.shards_per_file):
        differences.append(f"shards_per_file: {begun.shards_per_file}, now {shards_per_file}")
    if differences:
        raise PlanMismatchError(f"{folder} holds another export ({'; '.join(differences)}): choose another folder")
    return begun


def _schema(cache: Cache, plan: ExportPlan, number: int) -> pa.Schema:
    return file_schema(plan, number, [shard_digest(cache.record(shard)) for shard in plan.shards(number)])


def _is_there(cache: Cache, folder: Path, plan: ExportPlan, number: int) -> bool:
    """Whether a data file is whole and of this export; a damaged one is written again, a foreign one refused."""
    path = folder / plan.file_name(number)
    sweep(path.parent)
    if not path.exists():
        return False
    start, stop = plan.sequences(number)
    try:
        schema, rows = read_schema(path, plan), count_rows(path, plan)
    except DamagedError:
        return False
    if file_about(schema, plan, number) != file_about(_schema(cache, plan, number), plan, number):
        raise PlanMismatchError(f"{path} is of another export: choose another folder, or delete it")
    return rows == stop - start


def _shard_batches(cache: Cache, shard: int, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    record, manifest = cache.record(shard), cache.manifest
    reader = DirectReader(cache.path, manifest, record)
    for start, stop in blocks_of(0, record.sequences, manifest.packing.seq_len):
        try:
            block = read_block(reader, manifest, start, stop)
            batch = to_batch(manifest, record.start + start, block, schema)
        except DamagedError as error:
            raise damaged(shard, error.what or str(error)) from error
        yield batch


def _finish(cache: Cache, folder: Path, plan: ExportPlan) -> None:
    """The small files, last: `datasets` opens no folder of its kind without them."""
    copy_tokenizer(cache.path, folder)
    texts = {"README.md": readme(plan)}
    if plan.to == "datasets":
        names = [{"filename": plan.file_name(number)} for number in range(plan.files)]
        state: dict[str, Any] = {
            "_data_files": names,
            "_fingerprint": fingerprint(plan),
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": "train",
        }
        texts |= {"dataset_info.json": strict.dumps({}), "state.json": strict.dumps(state)}
    for name, text in texts.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
