"""The bounded local directory of remote shards, shared by any number of processes on one machine.

    CACHE_DIR/.lock                              held (flock) while room is made, never over the network
    CACHE_DIR/<manifest>/shards/NNNNNN-<attempt>.zarr         a whole shard: every hash was checked
    CACHE_DIR/<manifest>/shards/.NNNNNN-<attempt>.zarr.<bytes>.part   a download, which counts with all its bytes

There is no other state: nothing in shared memory, no counters, no files that say who uses what. A process that reads a
shard holds a shared flock on its directory, one that downloads holds an exclusive one on the .part directory, which a
rename turns into the shard's. The kernel drops these locks when a process dies, however it dies, so what a killed
process leaves is a .part without a lock, which the next one in need of room deletes. Eviction takes only directories
that nobody has locked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, final

from stillroom.storage.commits import CommitRecord
from stillroom.storage.errors import CacheError

_PART: Final = re.compile(r"\.(\d{6,12}-[0-9a-f]+\.zarr)\.(\d+)\.part")
_POLL_S: Final = 0.1
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Download = Callable[[CommitRecord, Path], None]


class FullError(CacheError):
    """There is no room, and nothing that may be evicted."""


@final
class Lease:
    """Keeps a local shard from being evicted, until `release` or the end of the process."""

    def __init__(self, handle: int) -> None:
        self._handle: int | None = handle
        self._pid = os.getpid()

    def release(self) -> None:
        """Let it go."""
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        if self._pid == os.getpid():  # a fork shares the lock with its parent, who may still need it
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


@final
class LocalShards:
    """The local copies of one cache's shards.

    Args:
        cache_dir: directory of all local copies; the cap counts everything in it.
        key: folder of this cache within it.
        cap_bytes: the most bytes of shards it may hold.
        wait_s: how long to wait for other processes to let go of what they read, where all room is in use.
    """

    def __init__(self, cache_dir: Path, key: str, *, cap_bytes: int, wait_s: float = 60.0) -> None:
        self.cache_dir: Final = cache_dir
        self.root: Final = cache_dir / key
        self.cap_bytes: Final = cap_bytes
        self.wait_s: Final = wait_s
        (self.root / "shards").mkdir(parents=True, exist_ok=True)

    def lease(
        self, record: CommitRecord, download: Download, *, keep: Collection[str] = (), wait: bool = True
    ) -> Lease:
        """Make sure the shard is here, whole, and stays.

        Args:
            record: of the shard.
            download: fills a directory with its objects, or raises.
            keep: paths of shards that will be needed soon: evicted last, or never where `wait` is off.
            wait: wait for room; else raise at once.

        Raises:
            CacheError: the cap is smaller than the shard, or (`FullError`) all room is in use.
        """
        if record.size_bytes > self.cap_bytes:
            raise CacheError(
                f"cache_bytes is {self.cap_bytes:,}, but shard {record.shard} alone holds {record.size_bytes:,} bytes: raise "
                "cache_bytes to several times that"
            )
        final = self.root / record.path
        deadline = time.monotonic() + self.wait_s
        while True:
            if lease := self._lease_present(final):
                return lease
            part = final.with_name(f".{final.name}.{record.size_bytes}.part")
            try:
                with self._locked():
                    handle, mine = _claim(part)
                    late = mine and final.is_dir()  # it came while we asked
                    if mine and not late:
                        try:
                            self._make_room(record.size_bytes, part, keep, spare_kept=not wait)
                        except BaseException:
                            _drop(part, handle)
                            raise
            except FullError:
                if not wait or time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)
                continue
            if late:
                _drop(part, handle)
            elif mine:
                return self._fill(record, download, part, final, handle)
            else:  # another process is at it: its lock is exclusive until it is done or dead
                fcntl.flock(handle, fcntl.LOCK_SH)
                _unlock(handle)

    def discard(self, record: CommitRecord) -> None:
        """Drop a local copy that is bad, whoever reads it."""
        with self._locked():
            _remove(self.root / record.path, in_use=True)

    def held_bytes(self) -> int:
        """Bytes of all shards here, downloads included."""
        with self._locked():
            return sum(size for _, size in self._contents())

    def _fill(self, record: CommitRecord, download: Download, part: Path, final: Path, handle: int) -> Lease:
        try:
            download(record, part)
            with self._locked():  # or a listing under way might see neither name
                part.rename(final)
        except OSError as error:
            _drop(part, handle)
            if error.errno in _NO_SPACE:
                raise CacheError(
                    f"{self.cache_dir} has no space for shard {record.shard} ({error.strerror}): lower cache_bytes "
                    f"(it is {self.cap_bytes:,}) or choose another cache_dir"
                ) from error
            raise
        except BaseException:
            _drop(part, handle)
            raise
        fcntl.flock(handle, fcntl.LOCK_SH)  # the same directory under its final name: from download to lease
        return Lease(handle)

    def _lease_present(self, final: Path) -> Lease | None:
        try:
            handle = os.open(final, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return None
        fcntl.flock(handle, fcntl.LOCK_SH)
        if not _same(final, handle):  # evicted between the two lines above
            _unlock(handle)
            return None
        os.utime(handle)  # what eviction sorts by
        return Lease(handle)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        handle = os.open(self.cache_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            _unlock(handle)

    def _contents(self) -> list[tuple[Path, int]]:
        """Every shard and download here with the bytes it counts for."""
        found = {}
        for path in self.cache_dir.glob("*/shards/*"):
            matched = _PART.fullmatch(path.name)
            size = int(matched[2]) if matched else sum(_size(file) for file in path.rglob("*"))
            # Once each, as a download may be renamed to its shard while we list.
            found[path.with_name(matched[1]) if matched else path] = (path, size)
        return list(found.values())

    def _make_room(self, needed: int, part: Path, keep: Collection[str], *, spare_kept: bool) -> None:
        others = [(path, size) for path, size in self._contents() if path != part]
        used = sum(size for _, size in others)
        if used + needed <= self.cap_bytes:
            return
        kept = {self.root / path for path in keep}
        # Leavings of the dead first, then what was used longest ago; what will be needed soon at the end.
        order = sorted(others, key=lambda item: (item[0] in kept, not item[0].name.startswith("."), _mtime(item[0])))
        for path, size in order:
            if used + needed <= self.cap_bytes:
                return
            if not (spare_kept and path in kept) and _remove(path):
                used -= size
        if used + needed > self.cap_bytes:
            raise FullError(
                f"{self.cache_dir} holds {used:,} of {self.cap_bytes:,} bytes, all in use, and {needed:,} more are wanted: raise "
                "cache_bytes, lower the window, or close other readers"
            )


def _claim(part: Path) -> tuple[int, bool]:
    """Open the download directory, empty where it is ours now; False where another process is filling it."""
    part.mkdir(exist_ok=True)
    handle = os.open(part, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return handle, False
    if not _same(part, handle):
        _unlock(handle)
        return _claim(part)
    for path in part.iterdir():  # what a killed process had fetched is of no use: its end is unknown
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return handle, True


def _remove(path: Path, *, in_use: bool = False) -> bool:
    """Delete a directory nobody has locked (or any, with `in_use`), under another name first: it never is there in part."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return True
    try:
        if not in_use:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.name.startswith(".gone-"):
            path = path.rename(path.with_name(f".gone-{secrets.token_hex(8)}"))
        shutil.rmtree(path, ignore_errors=True)
    except BlockingIOError:
        return False
    finally:
        _unlock(handle)
    return True


def _drop(part: Path, handle: int) -> None:
    if _same(part, handle):
        shutil.rmtree(part, ignore_errors=True)
    _unlock(handle)


def _unlock(handle: int) -> None:
    fcntl.flock(handle, fcntl.LOCK_UN)  # closing would not do: a fork may have a copy of the handle
    os.close(handle)


def _same(path: Path, handle: int) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    here = os.fstat(handle)
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size if file.is_file() else 0
    except FileNotFoundError:
        return 0


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
