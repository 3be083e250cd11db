"""The journal of a shard in hand: what the teacher gave so far, in a file that outlives the process.

A shard is committed whole or not at all (`commits`). Until then its targets, exact and not yet coded, are appended to a file
batch by batch, and whoever begins the shard after a kill goes on behind the last whole record. Nothing is flushed to the disk:
what a process has written survives its kill in the kernel's cache, and where the machine goes too the work is done again.

Every attempt has a file of its own, to which nobody else appends; others read it. With the commit all of a shard's go.
`journal_records` has the format.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from typing import Final, Self

from stillroom.storage.depot import Depot
from stillroom.storage.journal_records import Kept, first_of, header, record, records
from stillroom.storage.manifest import Manifest
from stillroom.storage.targets import SparseTargets

PARTIAL: Final = "partial"
ROOM: Final = 8  # journals of whole shards that must fit on the disk besides, or none is kept: commits come first
_NAME: Final = re.compile(r"(\d{6,12})-[0-9a-f]{16}\.journal")
logger = logging.getLogger("stillroom")


class Journals:
    """The journals of one cache. Any number of processes may use them at once.

    Args:
        folder: where they are; made with the first, removed with the last.
        manifest: of the cache.
        private: it lies where others write too, so it is used only if it is this user's and closed to all others.

    Attributes:
        unwilling: whether a journal could not be written: then no further one is begun.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, private: bool = False) -> None:
        self.folder: Final = folder
        self.manifest: Final = manifest
        self._private: Final = private
        self.unwilling = False

    def take_up(self, index: int, *, bad_rows: bool) -> list[Kept]:
        """What is known of a shard, from its first sequence on without a gap.

        Args:
            index: of the shard.
            bad_rows: whether sequences are wanted that have rows which no sampler could use.
        """
        paths = [path for number, path in self._files() if number == index]
        found = [(first, path) for path in paths if (first := first_of(path, self.manifest, index)) is not None]
        taken: list[Kept] = []
        done = 0
        for _, path in sorted(found):
            for kept in records(path, self.manifest, index, skip_to=done):
                if kept.first != done or (kept.bad_rows and not bad_rows):
                    break
                taken.append(kept)
                done += kept.sequences
        return taken

    def begin(self, index: int, first: int) -> Journal:
        """A new journal of a shard, from its sequence `first` on. Its file is there after the first `append`."""
        return Journal(self, index, first)

    def indices(self) -> set[int]:
        """Shards that have journals."""
        return {index for index, _ in self._files()}

    def clear(self, indices: Iterable[int]) -> None:
        """Delete the journals of these shards, whose-ever they are. To be called when they are committed."""
        gone, files = set(indices), self._files()
        with contextlib.suppress(OSError):  # what can not be deleted now is left to the next
            for path in (path for index, path in files if index in gone):
                path.unlink(missing_ok=True)
            if files:
                self.folder.rmdir()  # which fails as long as there are others

    def create(self, name: str) -> FileIO:
        """A new file, unbuffered.

        Raises:
            OSError: the disk refused, or the folder should be private and is not.
        """
        with contextlib.suppress(FileNotFoundError):
            return self._created(name)
        return self._created(name)  # another worker had just taken the empty folder away

    def _created(self, name: str) -> FileIO:
        self.folder.mkdir(mode=0o700 if self._private else 0o777, parents=True, exist_ok=True)
        if not self._ours():
            raise PermissionError("it must be this user's, and closed to others")
        return FileIO(self.folder / name, "x")

    def _files(self) -> list[tuple[int, Path]]:
        try:
            names = sorted(os.listdir(self.folder)) if self._ours() else []
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [(int(match[1]), self.folder / name) for name in names if (match := _NAME.fullmatch(name))]

    def _ours(self) -> bool:
        if not self._private:
            return True
        found = self.folder.lstat()
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


class Journal:
    """The journal of one attempt at a shard. Where it can not be written there is a warning and none, and the run goes on."""

    def __init__(self, journals: Journals, index: int, first: int) -> None:
        self._journals: Final = journals
        self._index: Final = index
        self._first: Final = first
        self._name: Final = f"{index:06d}-{secrets.token_hex(8)}.journal"
        self._next = first
        self._file: FileIO | None = None
        self._size_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()  # and kept, whatever happened

    def append(self, sequences: int, targets: SparseTargets, bad_rows: int) -> None:
        """Add the next sequences of the shard and the number of their bad rows; when it returns a kill does not lose them."""
        if self._journals.unwilling:
            return
        data = record(Kept(self._next, sequences, targets, bad_rows))
        self._next, self._size_bytes = self._next + sequences, self._size_bytes + len(data)
        try:
            if self._file is None:
                self._file = self._journals.create(self._name)
                _write(self._file, header(self._journals.manifest, self._index, self._first))
            self._check_room()
            _write(self._file, data)
        except OSError as error:
            self._journals.unwilling = True
            logger.warning(
                "no journal of the shard in hand is kept in %s (%s): a kill now costs up to three shards",
                self._journals.folder, error.strerror or error,
            )  # fmt: skip
            if self._file is not None:
                (self._journals.folder / self._name).unlink(missing_ok=True)

    def _check_room(self) -> None:
        start, stop = self._journals.manifest.shard_range(self._index)
        whole_bytes = self._size_bytes * (stop - start) // (self._next - self._first)
        if shutil.disk_usage(self._journals.folder).free < ROOM * whole_bytes:
            raise OSError(f"a shard's takes {whole_bytes:,} bytes, and the disk has no room for {ROOM}")


def journals_at(depot: Depot, manifest: Manifest) -> Journals:
    """Of a cache in a directory: in it, for every machine that sees it. Of one in an object store: in the temporary directory of
    this machine, for processes of this user."""
    if isinstance(depot.root, Path):
        return Journals(depot.root / PARTIAL, manifest)
    name = f"stillroom-{os.getuid()}-{manifest.identity[:32]}"
    return Journals(Path(tempfile.gettempdir()) / name, manifest, private=True)


def _write(file: FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:  # a write may take less than it is given
        rest = rest[file.write(rest) :]
