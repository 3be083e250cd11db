"""`import_cache`: an export, from anyone, back to a cache: every value checked, then the bytes the cache had."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stillroom.storage.encode import EncodedRows
from stillroom.storage.errors import DamagedError, FormatError
from stillroom.storage.interchange.batch_in import check_schema, from_batch
from stillroom.storage.interchange.files import count_rows, read_batches, read_schema
from stillroom.storage.interchange.plan import ExportPlan, file_about, shard_digest
from stillroom.storage.interchange.tokenizer import copy_tokenizer
from stillroom.storage.writer import CacheWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportResult:
    """What `import_cache` did.

    Attributes:
        out: the cache.
        shards: of the cache, `shards_before` of them were there already.
        identical: shards made now whose files are byte for byte those of the cache that was exported. (Another version
            of the compressor may pack the same codes into other bytes.)
        sequences, rows: in the whole cache.
        seconds: it took.
    """

    out: str
    shards: int
    shards_before: int
    identical: int
    sequences: int
    rows: int
    seconds: float

    @property
    def already_done(self) -> bool:
        """Whether there was nothing to do."""
        return self.shards == self.shards_before


def import_cache(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ImportResult:
    """Make a cache from an export; called again it goes on where it stopped.

    Args:
        folder: what `stillroom export` wrote, of any kind; it may be a copy from a hub.
        out: directory of the cache: new, or of the same cache.
        on_progress: told how many of the missing shards are done.

    Raises:
        NotACacheError: the folder holds no stillroom.json.
        FormatError: that file is malformed, or a data file lacks a column or is of another export.
        DamagedError: a data file is missing or damaged, or holds a value that no export can hold. Shards before it are
            committed.
        PlanMismatchError: `out` belongs to another run.
    """
    started, source, target = time.monotonic(), Path(folder), Path(out)
    plan = ExportPlan.load(source)
    manifest = plan.manifest
    digests = {number: _checked_digests(source, plan, number) for number in range(plan.files)}
    writer = CacheWriter(target, manifest)
    copy_tokenizer(source, target)
    before = {index for index in writer.committed() if index < manifest.shards}
    missing, done, identical = manifest.shards - len(before), 0, 0
    for number in range(plan.files):
        if before.issuperset(plan.shards(number)):
            continue
        reader = _FileReader(source, plan, number)
        for shard, digest in zip(plan.shards(number), digests[number]):
            blocks = reader.take(shard, skip=shard in before)
            if shard not in before:
                identical += shard_digest(writer.write_blocks(shard, blocks)) == digest
                done += 1
                on_progress(done, missing)
        reader.close()
    return ImportResult(
        out=str(target),
        shards=manifest.shards,
        shards_before=len(before),
        identical=identical,
        sequences=manifest.sequences,
        rows=manifest.sequences * manifest.packing.seq_len,
        seconds=time.monotonic() - started,
    )


def _checked_digests(source: Path, plan: ExportPlan, number: int) -> list[str]:
    """Look at the outside of every data file before a cache is begun."""
    path = source / plan.file_name(number)
    schema = read_schema(path, plan)
    check_schema(plan.manifest, schema, path.name)
    digests = file_about(schema, plan, number)
    if digests is None:
        raise FormatError(f"{path.name} is not the file that stillroom.json speaks of: export the cache again")
    start, stop = plan.sequences(number)
    if (rows := count_rows(path, plan)) != stop - start:
        raise DamagedError(
            f"{path.name} holds {rows} sequences, wanted {start} to {stop - 1}: fetch or export it again"
        )
    return digests


class _FileReader:
    """A data file, taken a shard at a time whatever its batches are."""

    def __init__(self, source: Path, plan: ExportPlan, number: int) -> None:
        self._path = source / plan.file_name(number)
        self._manifest = plan.manifest
        self._batches = read_batches(self._path, plan)
        self._batch = next(self._batches, None)

    def take(self, shard: int, *, skip: bool) -> list[EncodedRows]:
        """The checked codes of the next shard, or nothing if it is only to be passed over."""
        start, stop = self._manifest.shard_range(shard)
        blocks = []
        while start < stop:
            if self._batch is None:
                raise DamagedError(f"{self._path.name} ends before sequence {start}: fetch or export it again")
            part = self._batch.slice(0, stop - start)
            if not skip:
                try:
                    blocks.append(from_batch(self._manifest, part, start))
                except DamagedError as error:
                    raise DamagedError(f"{self._path.name}: {error}; fetch or export it again") from error
            start += part.num_rows
            rest = self._batch.slice(part.num_rows)
            self._batch = rest if rest.num_rows else next(self._batches, None)
        return blocks

    def close(self) -> None:
        """Release the file; it must hold no more."""
        if self._batch is not None:
            raise DamagedError(f"{self._path.name} holds more sequences than its shards")
