"""`open_cache`: a cache as a sequence of sequences, opened lazily, safe to pickle into loader workers.

Shapes: `B` sequences, `L` rows of a sequence, `R = B * L` rows, `P` positions.
"""

from __future__ import annotations

import os
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, get_args

import numpy as np
import numpy.typing as npt

from stillroom.storage.background import keep_scratch
from stillroom.storage.commits import CommitRecord, committed, damaged, load_record
from stillroom.storage.decode import Room, decode_rows, joined, plain_rows
from stillroom.storage.errors import CacheError, DamagedError, InputError
from stillroom.storage.gather import COLUMNS, Column, gather, gather_stored, needed
from stillroom.storage.index import Index, read_index
from stillroom.storage.manifest import Manifest
from stillroom.storage.readers import READERS, ReaderName, ShardReader
from stillroom.storage.stream import StreamOrder
from stillroom.storage.targets import SparseTargets

_OPEN_SHARDS: Final = 24  # each keeps up to ten file maps
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
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._records: dict[int, CommitRecord] = {}
        self._open: OrderedDict[int, ShardReader] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

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
        wanted = [int(index) for index in indices]
        step = max(1, _GROUP_ROWS // self.manifest.packing.seq_len)
        # One pair of arrays for all groups; what is not used of them is never touched, so it costs no memory.
        most = sum(self.record(self._locate(index)[0]).widths.entry for index in wanted)
        room = Room(np.empty(most, np.int32), np.empty(most, np.float32))
        parts: list[SequenceBatch] = []
        used = 0
        for i in range(0, len(wanted), step):
            parts.append(self._read_group(wanted[i : i + step], Room(room.ids[used:], room.weights[used:])))
            used += parts[-1].targets.entries
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return SequenceBatch(np.zeros((0, self.manifest.packing.seq_len + 1), np.uint32), _no_targets())
        return SequenceBatch(
            np.concatenate([part.tokens for part in parts]),
            joined([part.targets for part in parts], Room(room.ids[:used], room.weights[:used])),
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Sequences of each shard at hand: what a `StreamOrder` is made from."""
        return tuple(np.diff(self._ends, prepend=0).tolist())

    @property
    def default_window(self) -> int | None:
        """How many shards an order should mix at a time where nothing is said; None: all."""
        return None

    def follow(self, order: StreamOrder) -> Follower | None:
        """Whom to tell the position of a run that reads in `order`, so that its shards are here in time; None: they are."""
        return None

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
        place = int(np.searchsorted(self._ends, index, side="right"))
        return self.shards[place], index - (int(self._ends[place - 1]) if place else 0)

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

    def _read_group(self, indices: list[int], room: Room) -> SequenceBatch:
        manifest = self.manifest
        places = [self._locate(index) for index in indices]
        readers = [(self._shard(shard), within) for shard, within in places]
        spec, logp = manifest.sampler, "logp" in self.columns
        plain = manifest.profile == "fast" and not logp
        raw = gather_stored(readers, self._names, manifest, room) if plain else gather(readers, self._names, manifest)
        try:
            if plain:
                targets = plain_rows(manifest.vocab_size, spec.draws, raw)
            else:
                targets = decode_rows(spec, manifest.vocab_size, raw, logp=logp, room=room)
        except DamagedError as error:
            # Which of several sequences it was does not matter; which shard does.
            for index in indices if len(places) > 1 else ():
                self._read_group([index], room)
            raise damaged(places[0][0], str(error)) from error
        if "tokens" not in raw:
            return SequenceBatch(np.zeros((len(indices), 0), np.uint32), targets)
        tokens_BL1 = raw["tokens"].reshape(len(indices), -1).astype(np.uint32)
        known = max(manifest.vocab_size, manifest.tokenizer.vocab_size)
        if tokens_BL1.max() >= known:
            place = places[int(np.argmax(tokens_BL1.max(1)))]
            raise damaged(place[0], f"sequence {place[1]} has a token id that is not below {known}")
        return SequenceBatch(tokens_BL1, targets)


def _no_targets() -> SparseTargets:
    none = np.zeros(0, np.float32)
    return SparseTargets(np.zeros(1, np.int64), np.zeros(0, np.int32), none, none, none)


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
    manifest = Manifest.load(root)
    present = sorted(index for index in committed(root) if index < manifest.shards)
    if len(present) < manifest.shards and not partial:
        raise CacheError(
            f"{root} lacks {manifest.shards - len(present)} of {manifest.shards} shards: "
            "run `stillroom cache` again to make them, or open it with partial=True"
        )
    return Cache(root, manifest, present, reader, columns)
