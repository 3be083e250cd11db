"""Several caches as one: mixed target by target, or one after the other.

Mixing is linear: with shares c_k that sum to one, sum_k c_k w_k is an unbiased estimate of the mixture sum_k c_k p_k where every
w_k is one of p_k. So several teachers (ensembles, born-again generations) and several draws of one teacher mix alike.

Shapes: `B` sequences, `L` positions, `R` = B * L rows, `E` entries, `K` caches.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, final

import numpy as np
from torch.utils.data import Dataset

from stillroom.storage.cache import Cache, Follower
from stillroom.storage.errors import InputError
from stillroom.storage.remote.cache import RemoteCache
from stillroom.storage.stream import StreamOrder
from stillroom.storage.targets import SparseTargets
from stillroom.train.batch import Batch
from stillroom.train.data import CacheDataset, batch_of
from stillroom.train.validity import Kind, kind_of


@final
class MixedDataset(Dataset[Batch]):
    """Caches of the same tokens, their targets mixed.

    Args:
        caches: at least two, of the same corpus, packing, tokenizer and vocabulary.
        shares: of each in the mixture; they are divided by their sum.
        with_targets: False reads tokens only, from the first.

    Raises:
        InputError: caches of different tokens, or shares that are none.
    """

    def __init__(self, caches: Sequence[Cache], shares: Sequence[float], *, with_targets: bool = True) -> None:
        if len(caches) != len(shares) or not all(0.0 < share < math.inf for share in shares):
            raise InputError(
                f"shares came as {list(shares)} for {len(caches)} caches, wanted a positive number for each"
            )
        first = caches[0].manifest
        for cache in caches[1:]:
            _check_same(
                caches[0], cache, ("corpus.fingerprint", "packing", "tokenizer.fingerprint", "vocab_size", "sequences")
            )
            if isinstance(cache, RemoteCache) and cache.lengths != caches[0].lengths:
                raise InputError(
                    f"caches {caches[0].path.name} and {cache.path.name} are cut into other shards, and a remote one can only be "
                    "mixed shard by shard: copy it to a directory first"
                )
        self.caches, self.shares = tuple(caches), tuple(share / math.fsum(shares) for share in shares)
        self.with_targets = with_targets
        self._one_teacher = all(c.manifest.teacher.fingerprint == first.teacher.fingerprint for c in caches)
        self._reader = CacheDataset(caches[0], with_targets=with_targets)

    @property
    def seq_len(self) -> int:
        """Rows per sequence, L."""
        return self._reader.seq_len

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the caches' identities and shares."""
        told = [f"{cache.manifest.identity} {share!r}" for cache, share in zip(self.caches, self.shares)]
        return hashlib.sha256("\n".join(["mixed", *told]).encode()).hexdigest()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Sequences of each shard of the first cache."""
        return self._reader.lengths

    @property
    def kind(self) -> Kind:
        """What the mixture is: the weakest of the caches; of several teachers it has no log-probabilities."""
        kinds: set[Kind] = {kind_of(cache.manifest.sampler) for cache in self.caches}
        if "top" in kinds:
            return "top"
        if not self._one_teacher:
            return "several teachers"
        # A threshold's head stands at its own 1/N: mixed with another it is a sample with known log-probabilities.
        draws = {cache.manifest.sampler.draws for cache in self.caches}
        if len(kinds) == 1 and ("threshold" not in kinds or len(draws) == 1):
            return kinds.pop()
        return "counts with log p" if kinds <= {"threshold", "counts with log p"} else "counts"

    @property
    def default_window(self) -> int | None:
        """The smallest of the caches'."""
        return min((w for cache in self.caches if (w := cache.default_window) is not None), default=None)

    def follow(self, order: StreamOrder) -> Follower | None:
        """All that fetch ahead."""
        return _Followers.of([cache.follow(order) for cache in self.caches])

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        if not self.with_targets:
            return self._reader.__getitems__(indices)
        found = [cache.read(indices) for cache in self.caches]
        targets = mixed([part.targets for part in found], self.shares, one_teacher=self._one_teacher)
        return batch_of(found[0].tokens, targets, self.caches[0].starts(indices))


@final
class ChainedDataset(Dataset[Batch]):
    """Caches one after the other: sequences of the first, then of the second, in one order.

    Raises:
        InputError: caches of different sequence lengths, packings, tokenizers or vocabularies, or remote ones.
    """

    def __init__(self, caches: Sequence[Cache], *, with_targets: bool = True) -> None:
        for cache in caches:
            if isinstance(cache, RemoteCache):
                raise InputError(
                    f"cache {cache.path.name} is remote, and only caches in directories can be chained: copy it first"
                )
            _check_same(caches[0], cache, ("packing", "tokenizer.fingerprint", "vocab_size"))
        self.caches = tuple(caches)
        self._parts = [CacheDataset(cache, with_targets=with_targets) for cache in caches]
        self.with_targets = with_targets
        self._ends = list(accumulate(len(part) for part in self._parts))

    @property
    def seq_len(self) -> int:
        """Rows per sequence, L."""
        return self._parts[0].seq_len

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the caches' identities."""
        return hashlib.sha256("\n".join(["chained", *(part.fingerprint for part in self._parts)]).encode()).hexdigest()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Sequences of each shard of each cache."""
        return tuple(length for part in self._parts for length in part.lengths)

    @property
    def kind(self) -> Kind:
        """The weakest of the caches'."""
        kinds = {part.kind for part in self._parts}
        for weak in ("top", "counts", "threshold, head only", "counts with log p"):
            if weak in kinds:
                return weak
        return "threshold" if len({cache.manifest.sampler.draws for cache in self.caches}) == 1 else "counts with log p"

    @property
    def default_window(self) -> None:
        """All is at hand."""
        return None

    def follow(self, order: StreamOrder) -> None:
        """Nothing to fetch."""

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        part_B = [bisect_right(self._ends, index) for index in indices]
        tokens: list[Any] = [None] * len(indices)
        targets, starts = list(tokens), list(tokens)
        for part in sorted(set(part_B)):
            places = [place for place, other in enumerate(part_B) if other == part]
            first = self._ends[part - 1] if part else 0
            within = [indices[place] - first for place in places]
            found, begun = self.caches[part].read(within), self.caches[part].starts(within)
            for number, place in enumerate(places):
                tokens[place] = found.tokens[number]
                targets[place] = found.targets.slice_rows(number * self.seq_len, (number + 1) * self.seq_len)
                starts[place] = None if begun is None else begun[number]
        return batch_of(
            np.stack(tokens), SparseTargets.concat(targets), None if starts[0] is None else np.stack(starts),
            with_targets=self.with_targets,
        )  # fmt: skip


def mixed(parts: Sequence[SparseTargets], shares: Sequence[float], *, one_teacher: bool) -> SparseTargets:
    """sum_k shares[k] * parts[k], row by row; an id that several keep comes once.

    Args:
        parts: targets of the same rows.
        shares: sum to 1.
        one_teacher: whether all are draws of one distribution: then its log-probabilities and entropy are known. Of several
            teachers' mixture the label's log-probability is, the others are not.

    Returns:
        Entries by weight descending, then id; `logp` where it is known.
    """
    rows = parts[0].rows
    row_E = np.concatenate([np.repeat(np.arange(rows), np.diff(part.offsets)) for part in parts])
    id_E = np.concatenate([part.ids for part in parts]).astype(np.int64)
    weight_E = np.concatenate([part.weights.astype(np.float64) * share for part, share in zip(parts, shares)])
    key_E, first_E, of_E = np.unique(row_E << 32 | id_E, return_index=True, return_inverse=True)
    sum_E = np.bincount(of_E, weight_E, len(key_E)).astype(np.float32)
    order_E = np.lexsort((key_E, -sum_E, key_E >> 32))
    logps = [part.logp for part in parts if part.logp is not None]
    known = one_teacher and len(logps) == len(parts)
    share_KR = np.stack([np.log(share) + part.label_logp.astype(np.float64) for part, share in zip(parts, shares)])
    with np.errstate(invalid="ignore"):  # NaN: not read, or outside the loss mask
        label_logp = parts[0].label_logp if one_teacher else np.logaddexp.reduce(share_KR, axis=0).astype(np.float32)
    return SparseTargets(
        offsets=np.concatenate([[0], np.bincount(key_E >> 32, minlength=rows).cumsum()]).astype(np.int64),
        ids=(key_E[order_E] & 0xFFFFFFFF).astype(np.int32),
        weights=sum_E[order_E],
        label_logp=label_logp,
        entropy=parts[0].entropy if one_teacher else np.full(rows, np.nan, np.float32),
        logp=np.concatenate(logps)[first_E][order_E] if known else None,
    )


class _Followers:
    def __init__(self, parts: list[Follower]) -> None:
        self._parts = parts

    @classmethod
    def of(cls, parts: Sequence[Follower | None]) -> _Followers | None:
        found = [part for part in parts if part is not None]
        return cls(found) if found else None

    def advance(self, position: int) -> None:
        for part in self._parts:
            part.advance(position)

    def close(self) -> None:
        for part in self._parts:
            part.close()


def _check_same(one: Cache, other: Cache, fields: Sequence[str]) -> None:
    for name in fields:
        values = []
        for cache in (one, other):
            value: object = cache.manifest
            for step in name.split("."):
                value = getattr(value, step)
            values.append(value)
        if values[0] != values[1]:
            raise InputError(
                f"caches {one.path} and {other.path} differ in {name} ({values[0]} and {values[1]}): only caches of the "
                "same tokens can be mixed, and only those of one packing and vocabulary chained"
            )
