"""`open_remote`: a cache behind a URL, read through the bounded local directory."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stillroom.storage.cache import Cache, SequenceBatch
from stillroom.storage.commits import COMMITS, CommitRecord, load_record, shards_named
from stillroom.storage.errors import CacheError, DamagedError, FormatError, InputError, NotACacheError
from stillroom.storage.gather import COLUMNS, Column
from stillroom.storage.index import INDEX_NAME, Index
from stillroom.storage.manifest import MANIFEST_NAME, Manifest
from stillroom.storage.readers import READERS, ReaderName, ShardReader
from stillroom.storage.remote.beside import fetch_index, fetch_tokenizer, first_record, probe_records
from stillroom.storage.remote.fetch import download, intact
from stillroom.storage.remote.local import Lease, LocalShards
from stillroom.storage.remote.place import Place
from stillroom.storage.remote.prefetch import Prefetcher
from stillroom.storage.remote.retry import DEFAULT_RETRY
from stillroom.storage.sidecar import DERIVED, keep
from stillroom.storage.stream import StreamOrder
from stillroom.storage.targets import SparseTargets

DEFAULT_CACHE_BYTES: Final = 64 << 30
DEFAULT_WINDOW: Final = 8
_MOST_OPEN: Final = 24


@final
class RemoteCache(Cache):
    """A cache behind a URL. As `Cache`, but the shards that are read are here only while they are needed.

    Attributes:
        name: its URL without credentials.
        path: the local directory, which holds some of its shards.
    """

    def __init__(
        self,
        place: Place,
        manifest: Manifest,
        shards: list[int],
        reader: ReaderName,
        columns: tuple[Column, ...],
        *,
        local: LocalShards,
        index: Index | None,
    ) -> None:
        super().__init__(local.root, manifest, shards, reader, columns)
        self.name: Final = place.name
        self.local: Final = local
        self._place: Final = place
        self._index = index
        self._indexed: Final = index is not None
        self._pid = os.getpid()
        self._leases: dict[int, Lease] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_index": None, "_leases": {}}

    def read(self, indices: Iterable[int]) -> SequenceBatch:
        """As `Cache.read`; a shard whose local copy went bad on the disk is fetched again.

        Raises:
            IndexError: there is no such sequence.
            DamagedError: a shard is damaged where it comes from.
            CacheError: the store kept failing, or there is no room.
        """
        parts = [self._read_healed(part) for part in self._bounded([int(index) for index in indices])]
        if len(parts) == 1:
            return parts[0]
        return SequenceBatch(
            np.concatenate([part.tokens for part in parts]), SparseTargets.concat([part.targets for part in parts])
        )

    def row_codes(
        self, shard: int, start: int, stop: int, names: tuple[str, ...]
    ) -> dict[str, npt.NDArray[np.integer[Any]]]:
        """As `Cache.row_codes`; a local copy that went bad on the disk is fetched again. Raises as `read`."""
        try:
            return super().row_codes(shard, start, stop, names)
        except DamagedError:
            if not self._heal({shard}):
                raise
            return super().row_codes(shard, start, stop, names)

    def derived(self, name: str) -> Path:
        """As `Cache.derived`, in the local directory; what the store has of it is fetched once."""
        path = super().derived(name)
        if not path.exists():
            with contextlib.suppress(FileNotFoundError):
                keep(self.path, name, self._place.read(f"{DERIVED}/{name}"))
        return path

    def _bounded(self, wanted: list[int]) -> list[list[int]]:
        """`wanted` in runs that read no more shards at once than may be held."""
        runs: list[list[int]] = [[]]
        shards: set[int] = set()
        for index in wanted:
            shard = self.shard_of(index)
            if shard not in shards and len(shards) >= self._most_open(shard):
                runs.append([])
                shards = set()
            shards.add(shard)
            runs[-1].append(index)
        return runs

    def _read_healed(self, wanted: list[int]) -> SequenceBatch:
        try:
            return super().read(wanted)
        except DamagedError:
            if not self._heal({self.shard_of(index) for index in wanted}):
                raise
            return super().read(wanted)

    def _most_open(self, shard: int) -> int:
        return max(1, min(_MOST_OPEN, self.local.cap_bytes // (2 * self.record(shard).size_bytes)))

    def record(self, shard: int) -> CommitRecord:
        """Commit record of a shard, from the index or from the store.

        Raises:
            DamagedError: it is missing or malformed.
        """
        if shard not in self._records:
            index = self._open_index()
            try:
                self._records[shard] = index.record(shard) if index is not None else self._fetch_record(shard)
            except (KeyError, DamagedError):
                self._records[shard] = self._fetch_record(shard)
        return self._records[shard]

    def follow(self, order: StreamOrder) -> Prefetcher:
        """Fetch ahead of a run that reads in `order`; tell it where the run is with `advance`.

        Raises:
            InputError: two windows of the order do not fit in the local directory.
        """
        fits, cap = self.fitting_shards(), f"cache_bytes={self.local.cap_bytes:,}"
        if order.window < order.shards and 2 * order.window > fits:
            raise InputError(
                f"a window of {order.window} shards wants room for {2 * order.window}, and {cap} holds {fits}: raise "
                "cache_bytes or lower the window"
            )
        if order.window == order.shards and order.shards > fits:
            raise InputError(
                f"an order over all {order.shards} shards wants them all at once, and {cap} holds {fits}: give a window of at "
                f"most {max(1, fits // 2)} shards, or raise cache_bytes"
            )
        return Prefetcher(order, self.shards, self._prefetch)

    def fitting_shards(self) -> int:
        """How many shards the local directory holds."""
        largest = self._index.largest_bytes if self._index is not None else self.record(self.shards[0]).size_bytes
        return self.local.cap_bytes // largest

    @property
    def default_window(self) -> int | None:
        """Shards mixed at a time where nothing is said: 8, fewer if the local directory holds fewer than three times that."""
        fits = self.fitting_shards()
        return None if fits >= len(self.shards) else max(1, min(DEFAULT_WINDOW, fits // 3))

    def _open_shard(self, shard: int) -> ShardReader:
        record, lease = self._lease(shard)
        try:
            reader = READERS[self._reader](self.path, self.manifest, record)
        except BaseException:
            lease.release()
            raise
        weakref.finalize(reader, lease.release)
        self._leases[shard] = lease
        return reader

    def _shard(self, shard: int) -> ShardReader:
        if self._pid != os.getpid():  # after a fork: the parent's leases are not ours
            self._pid = os.getpid()
            self._open.clear()
            self._leases.clear()
        if shard not in self._open:
            while len(self._open) >= self._most_open(shard):  # before the next one asks for room
                self._open.popitem(last=False)
        return super()._shard(shard)

    def _lease(self, shard: int, keep: Collection[int] = (), *, wait: bool = True) -> tuple[CommitRecord, Lease]:
        record = self.record(shard)
        paths = [self.record(other).path for other in keep]
        try:
            return record, self.local.lease(record, self._download, keep=paths, wait=wait)
        except DamagedError:
            fresh = self._fetch_record(shard)  # the shard may have been made again since the index was written
            if fresh == record:
                raise
            self._records[shard] = fresh
            return fresh, self.local.lease(fresh, self._download, keep=paths, wait=wait)

    def _prefetch(self, shard: int, keep: Collection[int]) -> None:
        self._lease(shard, keep, wait=False)[1].release()

    def _download(self, record: CommitRecord, folder: Path) -> None:
        download(self._place, record, folder)

    def _heal(self, shards: set[int]) -> bool:
        """Drop the local copies that are not what was fetched; True if there were any."""
        bad = [record for record in map(self.record, shards) if not intact(record, self.path)]
        for record in bad:
            self._open.pop(record.shard, None)
            if lease := self._leases.pop(record.shard, None):
                lease.release()  # not left to the reader's end: the error under way holds it
            self.local.discard(record)
        return bool(bad)

    def _fetch_record(self, shard: int) -> CommitRecord:
        return load_record(self._place, self.manifest, shard)

    def _index_of_all(self) -> Index | None:
        index = self._open_index()
        return index if index is not None and tuple(index.shards.tolist()) == self.shards else None

    def _open_index(self) -> Index | None:
        if self._index is None and self._indexed:  # in a worker: from the local copy
            try:
                self._index = Index(pa.memory_map(str(self.path / INDEX_NAME)).read_buffer(), self.manifest)
            except (OSError, FormatError):
                return None
        return self._index


def open_remote(
    url: str,
    *,
    partial: bool = False,
    reader: ReaderName = "direct",
    columns: tuple[Column, ...] = COLUMNS,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    storage_options: Mapping[str, Any] | None = None,
) -> RemoteCache:
    """Open the cache behind `url`; see `stillroom.storage.cache.open_cache`."""
    if cache_bytes < 1:
        raise InputError(f"cache_bytes came as {cache_bytes}, wanted the bytes of several shards: raise it")
    place = Place(url, storage_options=storage_options, retry=DEFAULT_RETRY)
    try:
        manifest = Manifest.from_json(place.read_json(MANIFEST_NAME))
    except FileNotFoundError:
        raise NotACacheError(f"{place.name} holds no {MANIFEST_NAME}: name the folder of a cache") from None
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir)
    local = LocalShards(folder, manifest.identity[:32], cap_bytes=cache_bytes)
    index = fetch_index(place, manifest, local.root)
    records: dict[int, CommitRecord] = {}
    if index is not None and len(index.shards) == manifest.shards:
        shards = list(range(manifest.shards))
    elif place.lists:
        shards = sorted(shard for shard in shards_named(place.list(COMMITS)) if shard < manifest.shards)
    else:
        records = probe_records(place, manifest)
        shards = sorted(records)
    if len(shards) < manifest.shards and not partial:
        raise CacheError(
            f"{place.name} lacks {manifest.shards - len(shards)} of {manifest.shards} shards: finish it with `stillroom cache`, "
            "or open it with partial=True"
        )
    if shards:
        first = records.get(shards[0]) or first_record(place, manifest, index, shards[0])
        if first.size_bytes > cache_bytes:
            raise InputError(
                f"cache_bytes is {cache_bytes:,}, but shard {first.shard} of {place.name} alone holds {first.size_bytes:,} "
                "bytes: raise cache_bytes to several times that"
            )
    fetch_tokenizer(place, local.root)
    cache = RemoteCache(place, manifest, shards, reader, columns, local=local, index=index)
    cache._records.update(records)
    return cache


def default_cache_dir() -> Path:
    """`stillroom/` beside the hub library's own cache, which `HF_HOME` and `XDG_CACHE_HOME` move."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HF_HOME") or Path(base) / "huggingface") / "stillroom"
