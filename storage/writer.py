"""Writing a cache: one call a shard, safe against kills and against other writers of the same cache.

Shapes: `S` sequences of a shard, `L` rows of a sequence.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import re
import secrets
import shutil
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from stillroom.storage import strict
from stillroom.storage.background import Background, keep_scratch
from stillroom.storage.commits import (
    COMMITS,
    SHARDS,
    CommitRecord,
    ObjectInfo,
    committed,
    load_record,
    record_name,
)
from stillroom.storage.encode import EncodedRows, encode_rows
from stillroom.storage.errors import PlanMismatchError
from stillroom.storage.files import put_if_absent, sync_directory, write_durably
from stillroom.storage.manifest import MANIFEST_NAME, Manifest
from stillroom.storage.shard import shard_objects, widths_of
from stillroom.storage.targets import SparseTargets

ORPHAN_AGE_S: Final = 86400.0
_BLOCK_ROWS: Final = 1 << 14  # rows encoded at a time: bounds the float64 scratch, changes no byte
_OURS: Final = re.compile(r"\d{6,12}-[0-9a-f]{8,32}\.zarr|\..+\.tmp")


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
        root: directory of the cache; made if absent.
        manifest: what the cache is. Put as manifest.json unless one is there.
        waiting: shards that may wait in memory besides the one being written; `submit` blocks while there are more.

    Raises:
        PlanMismatchError: the directory belongs to another run.
        FormatError: its manifest cannot be read.
    """

    def __init__(self, root: str | os.PathLike[str], manifest: Manifest, *, waiting: int = 1) -> None:
        keep_scratch()
        self._background = Background(waiting)
        self.root = Path(root)
        (self.root / COMMITS).mkdir(parents=True, exist_ok=True)
        (self.root / SHARDS).mkdir(exist_ok=True)
        put_if_absent(self.root / MANIFEST_NAME, strict.dumps(manifest.to_json()).encode())
        self.manifest = Manifest.load(self.root)
        if differences := self.manifest.differences(manifest):
            raise PlanMismatchError(
                f"{self.root} belongs to another run ({'; '.join(differences)}): "
                "choose another directory, or the same settings to resume"
            )
        self.collect_orphans(ORPHAN_AGE_S)

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
    ) -> None:
        """`write_shard`, later. The arrays must not be changed until `close`.

        Raises:
            ValueError: shapes that do not fit the manifest, at once; values that do not, at the next call.
            OSError: the disk refused an earlier shard; those after it were dropped.
        """
        self._check(index, tokens_SL1, targets, rounding_R3)
        self._background.submit(partial(self.write_shard, index, tokens_SL1, targets, rounding_R3))

    def committed(self) -> set[int]:
        """Indices of the shards that need no more work."""
        return committed(self.root)

    def write_shard(
        self,
        index: int,
        tokens_SL1: npt.NDArray[np.uint32],
        targets: SparseTargets,
        rounding_R3: npt.NDArray[np.float64],
    ) -> CommitRecord:
        """Encode, write, flush and commit one shard; if it is committed already, only return its record.

        Args:
            index: of the shard.
            tokens_SL1: `[S, L+1]` token ids of its sequences.
            targets: its S * L rows, sequence after sequence.
            rounding_R3: `[S*L, 3]` float64 uniforms in [0, 1), a pure function of (seed, sequence, row), so that the bytes
                are a pure function of manifest, index and data.

        Raises:
            ValueError: shapes or values that do not fit the manifest.
            OSError: the disk refused; nothing is committed and the attempt is deleted.
        """
        self._check(index, tokens_SL1, targets, rounding_R3)
        if index in self.committed():
            return load_record(self.root, self.manifest, index)
        seq_len = self.manifest.packing.seq_len
        step = max(1, _BLOCK_ROWS // seq_len)
        blocks = [
            encode_rows(
                self.manifest,
                tokens_SL1[i : i + step],
                targets.slice_rows(i * seq_len, min(i + step, len(tokens_SL1)) * seq_len),
                rounding_R3[i * seq_len : (i + step) * seq_len],
            )
            for i in range(0, len(tokens_SL1), step)
        ]
        return self.write_blocks(index, blocks)

    def write_blocks(self, index: int, blocks: list[EncodedRows]) -> CommitRecord:
        """As `write_shard`, of rows that are encoded already (an import's, a re-encoding's).

        Args:
            index: of the shard.
            blocks: its sequences, in order, encoded as `encode_rows` does.

        Raises:
            OSError: the disk refused; nothing is committed and the attempt is deleted.
        """
        if index in self.committed():
            return load_record(self.root, self.manifest, index)
        widths = widths_of(blocks)
        attempt = self.root / SHARDS / f"{index:06d}-{secrets.token_hex(8)}.zarr"
        try:
            objects = []
            for name, data in shard_objects(self.manifest, index, blocks, widths):
                (attempt / name).parent.mkdir(parents=True, exist_ok=True)
                write_durably(attempt / name, data)
                objects.append(ObjectInfo(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
            for folder in sorted(attempt.rglob("*/"), reverse=True):
                sync_directory(folder)
            sync_directory(attempt)
            sync_directory(attempt.parent)
            start, stop = self.manifest.shard_range(index)
            record = CommitRecord(
                shard=index,
                path=f"{SHARDS}/{attempt.name}",
                start=start,
                stop=stop,
                rows=sum(int(block.lengths["row"].sum()) for block in blocks),
                entries=sum(int(block.lengths["entry"].sum()) for block in blocks),
                widths=widths,
                objects=tuple(objects),
                libraries=writer_libraries(),
                manifest=self.manifest.identity,
            )
            won = put_if_absent(self.root / record_name(index), strict.dumps(record.to_json()).encode())
        except BaseException:
            # Unless a record is there already: then it may be this attempt's.
            if index not in self.committed():
                shutil.rmtree(attempt, ignore_errors=True)
            raise
        if won:
            return record
        shutil.rmtree(attempt)
        return load_record(self.root, self.manifest, index)

    def _check(
        self,
        index: int,
        tokens_SL1: npt.NDArray[np.uint32],
        targets: SparseTargets,
        rounding_R3: npt.NDArray[np.float64],
    ) -> None:
        start, stop = self.manifest.shard_range(index)
        seq_len = self.manifest.packing.seq_len
        rows = (stop - start) * seq_len
        for name, came, wanted in (
            ("tokens_SL1", tokens_SL1.shape, (stop - start, seq_len + 1)),
            ("targets", (targets.rows,), (rows,)),
            ("rounding_R3", rounding_R3.shape, (rows, 3)),
        ):
            if came != wanted:
                raise ValueError(
                    f"`{name}` of shard {index} came as {list(came)}, wanted {list(wanted)}: "
                    f"the plan gives it sequences {start} to {stop - 1} of {seq_len} rows"
                )
        known = max(self.manifest.vocab_size, self.manifest.tokenizer.vocab_size)
        if tokens_SL1.min() < 0 or tokens_SL1.max() >= known:
            raise ValueError(f"token ids came up to {tokens_SL1.max()}, wanted below {known}: check the tokenizer")
        if not (rounding_R3.min() >= 0 and rounding_R3.max() < 1):
            raise ValueError("`rounding_R3` came outside [0, 1), wanted uniform numbers: see `uniforms`")

    def collect_orphans(self, age_s: float) -> list[Path]:
        """Delete attempts and temporary files that no record names and that nobody touched for `age_s` seconds.

        They are what a killed writer leaves. The age keeps a living writer's attempt safe.
        """
        places = [*(self.root / SHARDS).iterdir(), *(self.root / COMMITS).iterdir(), *self.root.iterdir()]
        old = [p for p in places if _OURS.fullmatch(p.name) and _age_s(p) > age_s]
        named = {load_record(self.root, self.manifest, index).path for index in self.committed()} if old else set()
        orphans = [path for path in old if f"{SHARDS}/{path.name}" not in named]
        for path in orphans:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        return orphans


def _age_s(path: Path) -> float:
    """Seconds since it was touched; none where another writer took it away since it was listed."""
    try:
        return time.time() - path.lstat().st_mtime
    except FileNotFoundError:
        return -math.inf
