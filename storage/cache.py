"""`open_cache`: a cache as a sequence of sequences, opened lazily, safe to pickle into loader workers.

Shapes: `B` sequences, `L` rows of a sequence, `R = B * L` rows, `P` positions.
"""

from __future__ import annotations

import os
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from stillroom.storage.commits import CommitRecord, committed, damaged, load_record
from stillroom.storage.decode import decode_rows
from stillroom.storage.errors import CacheError, DamagedError, InputError
from stillroom.storage.layout import id_high_bits
from stillroom.storage.manifest import Manifest
from stillroom.storage.readers import READERS, ReaderName, ShardReader
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


class Cache:
    """A cache open for reading; make one with `open_cache`.

    `cache[i]` and `cache.read` count the sequences at hand: all of them, or those of the committed shards where an
    incomplete cache was opened with `partial`.

    Attributes:
        path: its directory.
        manifest: what made it.
        shards: indices of the shards at hand, ascending.
    """

    def __init__(self, path: Path, manifest: Manifest, shards: list[int], reader: ReaderName, logp: bool) -> None:
        self.path: Final = path
        self.manifest: Final = manifest
        self.shards: Final = tuple(shards)
        self._reader: Final = reader
        self._logp: Final = logp
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
        wanted = [int(index) for index in indices]
        step = max(1, _GROUP_ROWS // self.manifest.packing.seq_len)
        parts = [self._read_group(wanted[i : i + step]) for i in range(0, len(wanted), step)]
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return SequenceBatch(np.zeros((0, self.manifest.packing.seq_len + 1), np.uint32), _no_targets())
        return SequenceBatch(
            np.concatenate([part.tokens for part in parts]), SparseTargets.concat([part.targets for part in parts])
        )

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
        for shard in self.shards:
            for item in self.record(shard).objects:
                sizes["metadata" if item.name.endswith("zarr.json") else item.name.split("/")[0]] += item.size_bytes
        return dict(sizes)

    @property
    def entries(self) -> int:
        """Kept entries over all shards at hand, from the commit records."""
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
            reader = self._open[shard] = READERS[self._reader](self.path, self.manifest, self.record(shard))
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(shard)
        return reader

    def _read_group(self, indices: list[int]) -> SequenceBatch:
        places = [self._locate(index) for index in indices]
        parts = [self._flat(self._shard(shard), within) for shard, within in places]
        raw = parts[0] if len(parts) == 1 else {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
        try:
            targets = decode_rows(self.manifest.sampler, self.manifest.vocab_size, raw, logp=self._logp)
        except DamagedError as error:
            # Which of several sequences it was does not matter; which shard does.
            for shard, within in places if len(places) > 1 else ():
                self._read_group([indices[places.index((shard, within))]])
            raise damaged(places[0][0], str(error)) from error
        tokens_BL1 = raw["tokens"].reshape(len(indices), -1).astype(np.uint32)
        return SequenceBatch(tokens_BL1, targets)

    def _flat(self, reader: ShardReader, within: int) -> dict[str, npt.NDArray[Any]]:
        """Unpadded arrays of one sequence, `id_lo` and `id_hi` joined into int32 `id`."""
        raw = {}
        skip = () if self._logp else ("logp_tail",) + (("logp",) if "kept" not in reader.arrays else ())
        n_L = reader.chunk("n", within)
        lengths = {"entry": int(n_L.sum(dtype=np.int64))}
        if "n_head" in reader.arrays:
            raw["n_head"] = reader.chunk("n_head", within)
            lengths["head"] = int(raw["n_head"].sum(dtype=np.int64))
            lengths["tail"] = lengths["entry"] - lengths["head"]
        for run, length in lengths.items():
            if not 0 <= length <= getattr(reader.record.widths, run):
                raise damaged(
                    reader.record.shard, f"sequence {within} claims {length} {run} elements, more than it has"
                )
        entries = lengths["entry"]
        raw["n"] = n_L
        for name, array in reader.arrays.items():
            if name in raw or name in skip or name in ("id_lo", "id_hi"):
                continue
            chunk = reader.chunk(name, within)
            if name == "count":
                chunk = chunk[: np.count_nonzero(chunk)]
            elif array.run in lengths:
                chunk = chunk[: lengths[array.run]]
            raw[name] = chunk
        code = reader.chunk("id_lo", within)[:entries].astype("<i4")
        if planes := id_high_bits(self.manifest.vocab_size):
            bits_PE = np.unpackbits(reader.chunk("id_hi", within), axis=1, count=entries, bitorder="little")
            for plane in range(1, planes):
                bits_PE[0] |= bits_PE[plane] << plane
            code.view(np.uint8)[2::4] = bits_PE[0]  # the third byte of every little-endian int32
        raw["id"] = code
        return raw


def _no_targets() -> SparseTargets:
    none = np.zeros(0, np.float32)
    return SparseTargets(np.zeros(1, np.int64), np.zeros(0, np.int32), none, none, none)


def open_cache(
    path: str | os.PathLike[str], *, partial: bool = False, reader: ReaderName = "direct", logp: bool = True
) -> Cache:
    """Open the cache at `path` for reading.

    Args:
        path: its directory.
        partial: take what is committed of an incomplete cache.
        reader: `direct` or, to cross-check, `zarr`.
        logp: decode the entries' log-probabilities; a loss that only needs weights reads faster without.

    Raises:
        NotACacheError: there is no manifest.
        FormatError: the manifest is malformed, or of a newer version.
        CacheError: shards are missing and `partial` is off.
    """
    if reader not in get_args(ReaderName):
        raise InputError(f"reader {reader!r} is unknown: choose one of {', '.join(get_args(ReaderName))}")
    root = Path(path)
    manifest = Manifest.load(root)
    present = sorted(index for index in committed(root) if index < manifest.shards)
    if len(present) < manifest.shards and not partial:
        raise CacheError(
            f"{root} lacks {manifest.shards - len(present)} of {manifest.shards} shards: "
            "run `stillroom cache` again to make them, or open it with partial=True"
        )
    return Cache(root, manifest, present, reader, logp)
