"""One shard from a `Place` into a directory: all its objects in ranges, in parallel, every hash checked."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from stillroom.storage.commits import CommitRecord, ObjectInfo
from stillroom.storage.errors import DamagedError
from stillroom.storage.remote.place import Place

RANGE_BYTES: Final = 8 << 20
_THREADS: Final = 8
_WHOLE_TRIES: Final = 2  # a wrong hash may be the network's; twice the same is the store's


def download(place: Place, record: CommitRecord, folder: Path) -> None:
    """Fetch the objects of a shard into `folder`.

    Not flushed to the disk: what a power failure spoils, the sizes and checksums find when it is read, and it is fetched again.

    Raises:
        DamagedError: an object is missing, or not what the record says, twice.
        CacheError: the store kept failing.
    """
    ranges = []
    for item in record.objects:
        path = folder / item.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.truncate(item.size_bytes)
        ranges += [(item, start) for start in range(0, item.size_bytes, RANGE_BYTES)]
    pool = ThreadPoolExecutor(min(_THREADS, len(ranges)), thread_name_prefix="stillroom-fetch")
    try:
        for _ in pool.map(lambda one: _copy(place, record, folder, *one), ranges):
            pass
        for _ in pool.map(lambda item: _check(place, record, folder, item), record.objects):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def intact(record: CommitRecord, root: Path) -> bool:
    """Whether the local copy of a shard still is what its record says."""
    try:
        return all(_sha256(root / record.path / item.name) == item.sha256 for item in record.objects)
    except OSError:
        return False


def _copy(place: Place, record: CommitRecord, folder: Path, item: ObjectInfo, start: int) -> None:
    stop = min(start + RANGE_BYTES, item.size_bytes)
    name = f"{record.path}/{item.name}"
    try:
        data = place.read(name, start, stop)
    except FileNotFoundError:
        raise DamagedError(
            f"{place.name}/{name} is missing, though the record of shard {record.shard} names it: copy the cache again, or "
            f"delete commits/{record.shard:06d}.json there and run `stillroom cache` on it"
        ) from None
    handle = os.open(folder / item.name, os.O_WRONLY)
    try:
        done = 0
        while done < len(data):
            done += os.pwrite(handle, memoryview(data)[done:], start + done)
    finally:
        os.close(handle)


def _check(place: Place, record: CommitRecord, folder: Path, item: ObjectInfo) -> None:
    for attempt in range(_WHOLE_TRIES):
        if _sha256(folder / item.name) == item.sha256:
            return
        if attempt < _WHOLE_TRIES - 1:
            for start in range(0, item.size_bytes, RANGE_BYTES):
                _copy(place, record, folder, item, start)
    raise DamagedError(
        f"{place.name}/{record.path}/{item.name} is not what the record of shard {record.shard} says (its SHA-256 differs, "
        f"{_WHOLE_TRIES} downloads alike): copy the cache again, or delete commits/{record.shard:06d}.json there and run "
        "`stillroom cache` on it"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
