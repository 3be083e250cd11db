"""`open_cache`: a cache as a sequence of sequences, opened lazily, safe to pickle into loader workers.

Shapes: `B` sequences, `L` rows of a sequence, `R = B * L` rows, `P` positions.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, get_args

import numpy as np
import numpy.typing as npt

from stillroom.storage.background import keep_scratch
from stillroom.storage.commits import CommitRecord, committed, damaged, load_record
from stillroom.storage.decode import decode_entries, plain_entries
from stillroom.storage.errors import CacheError, DamagedError, InputError
from stillroom.storage.gather import COLUMNS, Column, chunks_of, flat, gather, needed, starts_of
from stillroom.storage.index import Index, read_index
from stillroom.storage.manifest import DOCUMENTS, Manifest
from stillroom.storage.readers import READERS, ReaderName, ShardReader
from stillroom.storage.remote.snapshot import refuse_snapshot
from stillroom.storage.room import Room
from stillroom.storage.sidecar import DERIVED
from stillroom.storage.stream import StreamOrder
from stillroom.storage.targets import SparseTargets
from stillroom.storage.unpack import unpack

_OPEN_SHARDS: Final = 24  # each keeps up to ten file maps
_ROW_COLUMNS: Final = ("tokens", "label_logp", "entropy")
_GROUP_ROWS: Final = 1 << 13  # rows decoded at a time, so that the scratch stays in the processor's cache


class Sequence(NamedTuple):
    """One sequence: `tokens` `[L+1]` uint32, and the `targets` of its L rows; row t's label is tokens[t+1]."""

    tokens: npt.NDArray[np.uint32]
    targets: SparseTargets


class SequenceBatch(NamedTuple):
    """Several sequences: `tokens` `[B, L+1]` uint32, and the `targets` of their B * L rows, sequence after sequence."""

    tokens: npt.NDArray[np.uint32]
    targets: SparseTargets


class Follower(Protocol):
    """Is told where a run stands in its order, and fetches ahead."""

    def advance(self, position: int) -> None:
        """The next sequence to be read is the one at `position`."""

    def close(self) -> None:
        """The run has ended."""


class Cache:
    """A cache open for reading; make one with `open_cache`.

    `cache[i]` and `cache.read` count the sequences at hand: all of them, or those of the committed shards where an
    incomplete cache was opened with `partial`.

    Attributes:
        path: its directory.
        manifest: what made it.
        shards: indices of the shards at hand, ascending.
        columns: what is read besides ids and weights.
    """

    def __init__(
        self, path: Path, manifest: Manifest, shards: list[int], reader: ReaderName, columns: tuple[Column, ...]
    ) -> None:
        self.path: Final = path
        self.manifest: Final = manifest
        self.shards: Final = tuple(shards)
        self._reader: Final = reader
        self.columns: Final = tuple(column for column in COLUMNS if column in columns)
        self._names: Final = needed(manifest, self.columns)
        lengths = [stop - start for start, stop in map(manifest.shard_range, shards)]
        self._ends: list[int] = list(accumulate(lengths))
        self._records: dict[int, CommitRecord] = {}
        self._open: OrderedDict[int, ShardReader] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        # Maps stay behind: a worker opens its own.
        return {**self.__dict__, "_open": OrderedDict()}

    def __getitem__(self, index: int) -> Sequence:
        """Sequence `index`.

        Raises:
            IndexError: there is no such sequence.
            DamagedError: its shard is damaged.
        """
        tokens_BL1, targets = self.read([index])
        return Sequence(tokens_BL1[0], targets)

    def read(self, indices: Iterable[int]) -> SequenceBatch:
        """Sequences `indices`, in that order.

        Raises:
            IndexError: there is no such sequence.
            DamagedError: a shard is damaged.
        """
        keep_scratch()
        places = [self._locate(index) for index in indices]
        seq_len, sampler = self.manifest.packing.seq_len, self.manifest.sampler
        logp = "logp" in self.columns and sampler.keep_logp != "none"
        room = Room(len(places) * seq_len, sum(self.record(shard).widths.entry for shard, _ in places), logp)
        step = max(1, _GROUP_ROWS // seq_len)
        for i in range(0, len(places), step):
            self._read_group(places[i : i + step], room)
        tokens_BL1 = room.tokens((len(places), seq_len + 1 if "tokens" in self.columns else 0))
        known = max(self.manifest.vocab_size, self.manifest.tokenizer.vocab_size)
        if tokens_BL1.size and tokens_BL1.max() >= known:
            shard, within = places[int(np.argmax(tokens_BL1.max(1)))]
            raise damaged(shard, f"sequence {within} has a token id that is not below {known}")
        return SequenceBatch(tokens_BL1, room.targets())

    @property
    def lengths(self) -> tuple[int, ...]:
        """Sequences of each shard at hand: what a `StreamOrder` is made from."""
        return tuple(end - start for start, end in zip([0, *self._ends], self._ends))

    @property
    def default_window(self) -> int | None:
        """How many shards an order should mix at a time where nothing is said; None: all."""
        return None

    def follow(self, order: StreamOrder) -> Follower | None:
        """Whom to tell the position of a run that reads in `order`, so that its shards are here in time; None: they are."""
        return None

    def starts(self, indices: Iterable[int]) -> npt.NDArray[np.bool_] | None:
        """Where documents begin in sequences `indices`, `[B, L+1]`; None for packing `concat`. Raises as `read`."""
        if self.manifest.packing.policy != DOCUMENTS:
            return None
        return np.stack([starts_of(self._shard(shard), within) for shard, within in map(self._locate, indices)])

    def row_codes(
        self, shard: int, start: int, stop: int, names: tuple[str, ...]
    ) -> dict[str, npt.NDArray[np.integer[Any]]]:
        """Stored codes of arrays that have one for each row (docs/format.md), `[stop - start, L]` by name.

        Args:
            shard: one at hand.
            start, stop: sequences, counted within the shard.
            names: of `n`, `label_logp`, `entropy`.

        Raises:
            DamagedError: the shard is damaged.
        """
        reader = self._shard(shard)
        found = chunks_of([(reader, sequence) for sequence in range(start, stop)], list(names))
        return {name: np.stack(chunks) for name, chunks in found.items()}

    def derived(self, name: str) -> Path:
        """Where a file computed from this cache is kept (`sidecar`), whether it is there or not."""
        return self.path / DERIVED / name

    def shard_of(self, index: int) -> int:
        """The shard that holds sequence `index`.

        Raises:
            IndexError: there is no such sequence.
        """
        return self._locate(index)[0]

    def sequence_number(self, index: int) -> int:
        """Number of `cache[index]` in the whole run: what keys its random numbers. Equal to `index` if the cache is complete.

        Raises:
            IndexError: there is no such sequence.
        """
        shard, within = self._locate(index)
        return self.manifest.shard_range(shard)[0] + within

    def record(self, shard: int) -> CommitRecord:
        """Commit record of a shard.

        Raises:
            DamagedError: it is missing or malformed.
        """
        if shard not in self._records:
            self._records[shard] = load_record(self.path, self.manifest, shard)
        return self._records[shard]

    def bytes_by_array(self) -> dict[str, int]:
        """Bytes on disk by array, from the commit records; `metadata` counts the zarr.json files."""
        sizes: defaultdict[str, int] = defaultdict(int)
        if (index := self._index_of_all()) is not None:
            items = list(index.bytes_by_object().items())
        else:
            items = [(item.name, item.size_bytes) for shard in self.shards for item in self.record(shard).objects]
        for name, size_bytes in items:
            sizes["metadata" if name.endswith("zarr.json") else name.split("/")[0]] += size_bytes
        return dict(sizes)

    @property
    def entries(self) -> int:
        """Kept entries over all shards at hand, from the commit records."""
        if (index := self._index_of_all()) is not None:
            return index.entries
        return sum(self.record(shard).entries for shard in self.shards)

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(
                f"sequence {index} came, wanted 0 to {len(self) - 1}: the cache holds {len(self)} sequences"
            )
        place = bisect_right(self._ends, index)
        return self.shards[place], int(index) - (self._ends[place - 1] if place else 0)

    def _shard(self, shard: int) -> ShardReader:
        reader = self._open.get(shard)
        if reader is None:
            reader = self._open[shard] = self._open_shard(shard)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(shard)
        return reader

    def _open_shard(self, shard: int) -> ShardReader:
        return READERS[self._reader](self.path, self.manifest, self.record(shard))

    def _index_of_all(self) -> Index | None:
        """The index, if it holds just the shards at hand."""
        index = read_index(self.path, self.manifest)
        return index if index is not None and tuple(index.shards.tolist()) == self.shards else None

    def _read_group(self, places: list[tuple[int, int]], room: Room) -> None:
        """Put the rows of (shard, sequence within it) `places` into `room`: compiled where that goes, else in numpy."""
        manifest, names = self.manifest, self._names
        readers = [(self._shard(shard), within) for shard, within in places]
        if self._reader == "direct" and manifest.profile != "small":
            chunks = chunks_of(readers, names)
            if unpack(manifest, chunks, room):
                room.put_codes({name: np.concatenate(chunks[name]) for name in _ROW_COLUMNS if name in chunks})
                return
        try:
            if manifest.profile == "fast" and room.logp is None:
                raw = flat(readers, chunks_of(readers, names), manifest)
                room.put(plain_entries(manifest.vocab_size, manifest.sampler.draws + 1, raw))
            else:
                raw = gather(readers, names, manifest)
                room.put(decode_entries(manifest.sampler, manifest.vocab_size, raw, logp=room.logp is not None))
        except DamagedError as error:
            # Which of several sequences it was does not matter; which shard does.
            for place in places if len(places) > 1 else ():
                self._read_group([place], room)
            raise damaged(places[0][0], str(error)) from error
        room.put_codes({name: raw[name] for name in _ROW_COLUMNS if name in raw})


def open_cache(
    path: str | os.PathLike[str],
    *,
    partial: bool = False,
    reader: ReaderName = "direct",
    columns: tuple[Column, ...] = COLUMNS,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Cache:
    """Open the cache at `path` for reading.

    Args:
        path: its directory, or a URL: s3://, gs://, az://, hf://, http(s):// or another that fsspec knows (docs/streaming.md).
        partial: take what is committed of an incomplete cache.
        reader: `direct` or, to cross-check, `zarr`.
        columns: what to read besides ids and weights: any of `tokens`, `logp`, `label_logp`, `entropy`. What a loss does not
            need costs time: left out, `tokens` come as `[B, 0]`, `logp` as None, the others as NaN.
        cache_dir: for a URL: directory of the local copies (unset: `stillroom/` in the hub library's cache).
        cache_bytes: for a URL: the most bytes of shards kept there (unset: 64 GiB).
        storage_options: for a URL: keyword arguments of its file system.

    Raises:
        NotACacheError: there is no manifest.
        FormatError: the manifest is malformed, or of a newer version.
        CacheError: shards are missing and `partial` is off, or a store that can not be reached.
        InputError: options that do not fit.
    """
    if reader not in get_args(ReaderName):
        raise InputError(f"reader {reader!r} is unknown: choose one of {', '.join(get_args(ReaderName))}")
    if unknown := sorted(set(columns) - set(COLUMNS)):
        raise InputError(f"column {unknown[0]!r} is unknown: choose among {', '.join(COLUMNS)}")
    if isinstance(path, str) and "://" in path:
        from stillroom.storage.remote.cache import DEFAULT_CACHE_BYTES, open_remote

        return open_remote(
            path,
            partial=partial,
            reader=reader,
            columns=columns,
            cache_dir=cache_dir,
            cache_bytes=DEFAULT_CACHE_BYTES if cache_bytes is None else cache_bytes,
            storage_options=storage_options,
        )
    if cache_dir is not None or cache_bytes is not None or storage_options is not None:
        raise InputError(
            f"{os.fspath(path)} is a directory, and cache_dir, cache_bytes and storage_options are for URLs: drop them"
        )
    root = Path(path)
    refuse_snapshot(root)
    manifest = Manifest.load(root)
    present = sorted(index for index in committed(root) if index < manifest.shards)
    if len(present) < manifest.shards and not partial:
        raise CacheError(
            f"{root} lacks {manifest.shards - len(present)} of {manifest.shards} shards: "
            "run `stillroom cache` again to make them, or open it with partial=True"
        )
    return Cache(root, manifest, present, reader, columns)
