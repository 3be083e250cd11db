"""Writing a cache: one call a shard, safe against kills and against other writers of the same cache.

Shapes: `S` sequences of a shard, `L` rows of a sequence.
"""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from stillroom.storage import strict
from stillroom.storage.background import Background, keep_scratch
from stillroom.storage.commits import (
    COMMITS,
    SHARDS,
    CommitRecord,
    ObjectInfo,
    find_record,
    load_record,
    record_name,
    shards_named,
)
from stillroom.storage.depot import Depot, depot_at
from stillroom.storage.encode import EncodedRows, encode_rows
from stillroom.storage.errors import PlanMismatchError
from stillroom.storage.journal import journals_at
from stillroom.storage.manifest import DOCUMENTS, MANIFEST_NAME, Manifest
from stillroom.storage.orphans import collect_orphans
from stillroom.storage.shard import shard_objects, widths_of
from stillroom.storage.targets import SparseTargets

_BLOCK_ROWS: Final = 1 << 14  # rows encoded at a time: bounds the float64 scratch, changes no byte


@lru_cache(maxsize=1)  # two milliseconds of reading package metadata, which every shard would pay
def writer_libraries() -> dict[str, str]:
    """Versions of what turns targets into bytes."""
    names = ("numpy", "numcodecs", "google-crc32c")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


class CacheWriter:
    """Writes the shards of one cache. Any number of processes may do so at once; a committed shard is never rewritten.

    `write_shard` returns when the shard is committed. `submit` returns at once and does the same on a thread of the writer's,
    one shard at a time; leave a `with` block, or call `close`, to wait for it:

        with CacheWriter(root, manifest) as writer:
            writer.submit(index, tokens_SL1, targets, rounding_R3)

    Args:
        root: directory of the cache (made if absent), URL of an object store, or a `Depot`.
        manifest: what the cache is. Put as manifest.json unless one is there.
        waiting: shards that may wait in memory besides the one being written; `submit` blocks while there are more.
        storage_options: for a URL: keyword arguments of the store.

    Attributes:
        root: what `open_cache` takes.
        manifest: of the cache, as it was found or put.
        journals: of its shards in hand; those of a shard go when it is committed.
        encode_s, commit_s: seconds it spent so far on making bytes, and on writing, flushing and committing them.

    Raises:
        PlanMismatchError: the place belongs to another run.
        FormatError: its manifest cannot be read.
        InputError: a URL that can not be written to.
        CacheError: a store that refuses, keeps failing, or has no conditional put.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Depot,
        manifest: Manifest,
        *,
        waiting: int = 1,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        keep_scratch()
        self._background = Background(waiting)
        self.encode_s = self.commit_s = 0.0
        self.depot: Final = depot_at(root, storage_options=storage_options)
        self.root: Final = self.depot.root
        self.depot.prepare(COMMITS, SHARDS)
        self.manifest: Final = self._settled(manifest)
        if differences := self.manifest.differences(manifest):
            raise PlanMismatchError(
                f"{self.depot.name} belongs to another run ({'; '.join(differences)}): "
                "choose another directory, or the same settings to resume"
            )
        collect_orphans(self.depot, self.manifest)
        self.journals: Final = journals_at(self.depot, self.manifest)
        if begun := self.journals.indices():
            self.journals.clear(begun & self.committed())  # whose writer was killed between the commit and this

    def _settled(self, manifest: Manifest) -> Manifest:
        """The manifest that is there; `manifest`, unless another writer was first."""
        try:
            return Manifest.from_json(self.depot.read_json(MANIFEST_NAME))
        except FileNotFoundError:
            self.depot.put_if_absent(MANIFEST_NAME, strict.dumps(manifest.to_json()).encode())
            return Manifest.from_json(self.depot.read_json(MANIFEST_NAME))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # After an error: finish the shard in hand, drop those that wait; the error goes on.
        self._background.close(drop=kind is not None)

    def close(self) -> None:
        """Wait for what was submitted.

        Raises:
            ValueError, OSError: what `write_shard` raised on the thread.
        """
        self._background.close()

    def submit(
        self,
        index: int,
        tokens_SL1: npt.NDArray[np.uint32],
        targets: SparseTargets,
        rounding_R3: npt.NDArray[np.float64],
        starts_SL1: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """`write_shard`, later. The arrays must not be changed until `close`.

        Raises:
            ValueError: shapes that do not fit the manifest, at once; values that do not, at the next call.
            OSError, CacheError: an earlier shard could not be written; those after it were dropped.
        """
        self._check_shapes(index, tokens_SL1, targets, rounding_R3, starts_SL1)
        self._background.submit(partial(self._write, index, tokens_SL1, targets, rounding_R3, starts_SL1))

    def committed(self) -> set[int]:
        """Indices of the shards that need no more work."""
        return shards_named(self.depot.names(COMMITS))

    def record(self, index: int) -> CommitRecord | None:
        """The record of a shard, or None if it has none.

        Raises:
            DamagedError: it is malformed, or of another run.
        """
        return find_record(self.depot, self.manifest, index)

    def write_shard(
        self,
        index: int,
        tokens_SL1: npt.NDArray[np.uint32],
        targets: SparseTargets,
        rounding_R3: npt.NDArray[np.float64],
        starts_SL1: npt.NDArray[np.bool_] | None = None,
    ) -> CommitRecord:
        """Encode, write, flush and commit one shard; if it is committed already, only return its record.

        Args:
            index: of the shard.
            tokens_SL1: `[S, L+1]` token ids of its sequences.
            targets: its S * L rows, sequence after sequence.
            rounding_R3: `[S*L, 3]` float64 uniforms in [0, 1), a pure function of (seed, sequence, row), so that the bytes
                are a pure function of manifest, index and data.
            starts_SL1: `[S, L+1]` bool, tokens that begin a document: for packing `documents`, and for no other.

        Raises:
            ValueError: shapes or values that do not fit the manifest.
            OSError, CacheError: the disk or the store refused; nothing is committed and the attempt is deleted.
        """
        self._check_shapes(index, tokens_SL1, targets, rounding_R3, starts_SL1)
        return self._write(index, tokens_SL1, targets, rounding_R3, starts_SL1)

    def _write(
        self,
        index: int,
        tokens_SL1: npt.NDArray[np.uint32],
        targets: SparseTargets,
        rounding_R3: npt.NDArray[np.float64],
        starts_SL1: npt.NDArray[np.bool_] | None = None,
    ) -> CommitRecord:
        record = self._encoded_and_written(index, tokens_SL1, targets, rounding_R3, starts_SL1)
        self.journals.clear([index])
        return record

    def _encoded_and_written(
        self,
        index: int,
        tokens_SL1: npt.NDArray[np.uint32],
        targets: SparseTargets,
        rounding_R3: npt.NDArray[np.float64],
        starts_SL1: npt.NDArray[np.bool_] | None = None,
    ) -> CommitRecord:
        if record := self.record(index):
            return record
        self._check_values(tokens_SL1, rounding_R3)
        seq_len = self.manifest.packing.seq_len
        step = max(1, _BLOCK_ROWS // seq_len)
        start_s = time.perf_counter()
        blocks = [
            encode_rows(
                self.manifest,
                tokens_SL1[i : i + step],
                targets.slice_rows(i * seq_len, min(i + step, len(tokens_SL1)) * seq_len),
                rounding_R3[i * seq_len : (i + step) * seq_len],
                None if starts_SL1 is None else starts_SL1[i : i + step],
            )
            for i in range(0, len(tokens_SL1), step)
        ]
        self.encode_s += time.perf_counter() - start_s
        return self.write_blocks(index, blocks)

    def write_blocks(self, index: int, blocks: list[EncodedRows]) -> CommitRecord:
        """As `write_shard`, of rows that are encoded already (an import's, a re-encoding's).

        Args:
            index: of the shard.
            blocks: its sequences, in order, encoded as `encode_rows` does.

        Raises:
            OSError, CacheError: the disk or the store refused; nothing is committed and the attempt is deleted.
        """
        if record := self.record(index):
            return record
        start_s, encoded_s = time.perf_counter(), 0.0
        widths = widths_of(blocks)
        attempt = f"{SHARDS}/{index:06d}-{secrets.token_hex(8)}.zarr"
        objects: list[ObjectInfo] = []

        def hashed() -> Iterator[tuple[str, bytes]]:
            nonlocal encoded_s
            mark_s = time.perf_counter()
            for name, data in shard_objects(self.manifest, index, blocks, widths):
                objects.append(ObjectInfo(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
                encoded_s += time.perf_counter() - mark_s
                yield name, data
                mark_s = time.perf_counter()

        try:
            self.depot.put_folder(attempt, hashed())
        except BaseException:
            self.depot.discard(attempt)
            raise
        start, stop = self.manifest.shard_range(index)
        record = CommitRecord(
            shard=index,
            path=attempt,
            start=start,
            stop=stop,
            rows=sum(int(block.lengths["row"].sum()) for block in blocks),
            entries=sum(int(block.lengths["entry"].sum()) for block in blocks),
            widths=widths,
            objects=tuple(objects),
            libraries=writer_libraries(),
            manifest=self.manifest.identity,
        )
        try:
            won = self.depot.put_if_absent(record_name(index), strict.dumps(record.to_json()).encode())
        except BaseException:
            # Else the record may name this attempt: then it has to stay.
            if self.depot.surely_absent(record_name(index)):
                self.depot.discard(attempt)
            raise
        self.encode_s += encoded_s
        self.commit_s += time.perf_counter() - start_s - encoded_s
        if won:
            return record
        self.depot.discard(attempt)
        return load_record(self.depot, self.manifest, index)

    def add_folder(self, name: str, folder: Path) -> None:
        """Put the files of a local folder beside the shards, as folder `name`; a file that is there is left as it is."""
        there = set(self.depot.names(name))
        missing = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in there]
        if missing:
            self.depot.prepare(name)
        for path in missing:
            self.depot.put_if_absent(f"{name}/{path.name}", path.read_bytes())

    def _check_shapes(
        self,
        index: int,
        tokens_SL1: npt.NDArray[np.uint32],
        targets: SparseTargets,
        rounding_R3: npt.NDArray[np.float64],
        starts_SL1: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        start, stop = self.manifest.shard_range(index)
        seq_len = self.manifest.packing.seq_len
        rows = (stop - start) * seq_len
        told_apart = self.manifest.packing.policy == DOCUMENTS
        for name, came, wanted in (
            ("tokens_SL1", tokens_SL1.shape, (stop - start, seq_len + 1)),
            ("targets", (targets.rows,), (rows,)),
            ("rounding_R3", rounding_R3.shape, (rows, 3)),
            (
                "starts_SL1",
                () if starts_SL1 is None else starts_SL1.shape,
                (stop - start, seq_len + 1) if told_apart else (),
            ),
        ):
            if came != wanted:
                raise ValueError(
                    f"`{name}` of shard {index} came as {list(came)}, wanted {list(wanted)}: "
                    f"the plan gives it sequences {start} to {stop - 1} of {seq_len} rows"
                )

    def _check_values(self, tokens_SL1: npt.NDArray[np.uint32], rounding_R3: npt.NDArray[np.float64]) -> None:
        known = max(self.manifest.vocab_size, self.manifest.tokenizer.vocab_size)
        if tokens_SL1.min() < 0 or tokens_SL1.max() >= known:
            raise ValueError(f"token ids came up to {tokens_SL1.max()}, wanted below {known}: check the tokenizer")
        if not (rounding_R3.min() >= 0 and rounding_R3.max() < 1):
            raise ValueError("`rounding_R3` came outside [0, 1), wanted uniform numbers: see `uniforms`")

    def collect_orphans(self, age_s: float) -> list[str]:
        """As `orphans.collect_orphans`."""
        return collect_orphans(self.depot, self.manifest, age_s)
