"""The two sources of batches, and the order of sequences.

A source is a `torch.utils.data.Dataset` of sequences whose `__getitems__` fetches a whole batch at once; with `OrderSampler`
as the `batch_sampler` of a `DataLoader` (and `collate_fn=as_is`) they serve any training loop.

Shapes: `B` sequences, `L` positions, `N` = B * L rows, `S` sequences of the source, `P` positions in the order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol, final

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from stillroom.kernels.targets import SparseTargets
from stillroom.storage import targets as storage_targets
from stillroom.storage.cache import Cache, Follower
from stillroom.storage.errors import InputError
from stillroom.storage.remote.cache import RemoteCache
from stillroom.storage.segments import positions_of
from stillroom.storage.selection import Selection
from stillroom.storage.stream import StreamOrder
from stillroom.train.batch import Batch
from stillroom.train.validity import Kind, kind_of

IGNORED = -100  # label of a row outside the loss mask


class Source(Protocol):
    """Sequences by number, a batch at a time."""

    @property
    def seq_len(self) -> int:
        """Rows per sequence, L."""

    @property
    def fingerprint(self) -> str:
        """Hash of what the source holds; where it lies plays no part."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Sequences of each shard, in the order of their numbers."""

    @property
    def kind(self) -> Kind | None:
        """What its targets are, as far as losses care; None where it has tokens only."""

    @property
    def default_window(self) -> int | None:
        """How many shards to mix at a time where nothing is said; None: all."""

    def follow(self, order: StreamOrder) -> Follower | None:
        """Whom to tell where a run stands in `order`, so that its data is fetched ahead; None where it is at hand."""

    def __len__(self) -> int: ...
    def __getitems__(self, indices: list[int]) -> Batch: ...


@final
class CacheDataset(Dataset[Batch]):
    """The sequences of a cache with their targets.

    Args:
        cache: an open cache.
        with_targets: False leaves `Batch.targets` empty, for losses that want the tokens only.
    """

    def __init__(self, cache: Cache, *, with_targets: bool = True) -> None:
        self.cache = cache
        self.with_targets = with_targets

    @property
    def seq_len(self) -> int:
        """Rows per sequence, L."""
        return self.cache.manifest.packing.seq_len

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest's identity fields."""
        return self.cache.manifest.identity

    @property
    def lengths(self) -> tuple[int, ...]:
        """Sequences of each shard at hand."""
        return self.cache.lengths

    @property
    def kind(self) -> Kind:
        """By the cache's sampler."""
        return kind_of(self.cache.manifest.sampler)

    @property
    def default_window(self) -> int | None:
        """None for a cache on disk; for a remote one what its local directory holds."""
        return self.cache.default_window

    def follow(self, order: StreamOrder) -> Follower | None:
        """Prefetching of a remote cache."""
        return self.cache.follow(order)

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        found = self.cache.read(indices)
        return batch_of(found.tokens, found.targets, self.cache.starts(indices), with_targets=self.with_targets)


@final
class TokenDataset(Dataset[Batch]):
    """Plain token sequences, for cross-entropy and live teachers.

    Args:
        tokens_SL1: `[S, L+1]` unsigned or signed integers; row t of a sequence has the context `0..t` and the label `t+1`.

    Raises:
        InputError: another shape or dtype, or no sequence.
    """

    def __init__(self, tokens_SL1: npt.NDArray[np.integer]) -> None:
        if (
            tokens_SL1.ndim != 2
            or tokens_SL1.shape[0] < 1
            or tokens_SL1.shape[1] < 2
            or tokens_SL1.dtype.kind not in "iu"
        ):
            raise InputError(
                f"tokens came as {tokens_SL1.dtype}{list(tokens_SL1.shape)}, wanted integers [sequences, seq_len + 1]: "
                "pack the text into sequences of one length"
            )
        self.tokens_SL1 = tokens_SL1

    @property
    def seq_len(self) -> int:
        """Rows per sequence, L."""
        return int(self.tokens_SL1.shape[1]) - 1

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the shape and the tokens as uint32."""
        digest = hashlib.sha256(str(self.tokens_SL1.shape).encode())
        for start in range(0, len(self), 1024):
            digest.update(np.ascontiguousarray(self.tokens_SL1[start : start + 1024], dtype="<u4").data)
        return digest.hexdigest()

    @property
    def lengths(self) -> tuple[int, ...]:
        """One run of sequences."""
        return (len(self),)

    @property
    def kind(self) -> None:
        """Tokens only."""
        return None

    @property
    def default_window(self) -> None:
        """All is at hand."""
        return None

    def follow(self, order: StreamOrder) -> None:
        """Nothing to fetch."""

    def __len__(self) -> int:
        return len(self.tokens_SL1)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        return _split(self.tokens_SL1[indices])


@final
class OrderSampler(Sampler[list[int]]):
    """Batches of sequence numbers: an order (`order_of`) cut into steps, parts and ranks.

    Step k takes the positions `start + k * batch_size ... start + (k + 1) * batch_size - 1` of the endless order. It is a
    pure function of k, so a resumed run starts at `first_step` without reading what came before, and neither the number of
    parts nor of processes changes what a step holds.

    Args:
        order: which sequence stands where.
        batch_size: sequences per step over all parts and ranks.
        steps: steps of the whole run; `len` counts all their parts, also the skipped ones.
        parts: micro-batches per step.
        rank, ranks: this process and how many there are.
        first_step: step to start at.
        start: position of step 0.
        follow: `source.follow`, so that a remote source fetches ahead of this sampler.
    """

    def __init__(
        self,
        order: StreamOrder,
        *,
        batch_size: int,
        steps: int,
        parts: int = 1,
        rank: int = 0,
        ranks: int = 1,
        first_step: int = 0,
        start: int = 0,
        follow: Callable[[StreamOrder], Follower | None] | None = None,
    ) -> None:
        self.order = order
        self.batch_size = batch_size
        self.steps = steps
        self.parts = parts
        self.rank = rank
        self.ranks = ranks
        self.first_step = first_step
        self.start = start
        self.follow = follow

    def __len__(self) -> int:
        return self.steps * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        follower = None if self.follow is None else self.follow(self.order)
        try:
            for step in range(self.first_step, self.steps):
                if follower is not None:
                    follower.advance(self.start + step * self.batch_size)
                for part in np.array_split(self.step(step), self.parts * self.ranks)[self.rank :: self.ranks]:
                    yield part.tolist()
        finally:
            if follower is not None:
                follower.close()

    def step(self, step: int) -> npt.NDArray[np.int64]:
        """Sequence numbers of one step, `[batch_size]`."""
        first = self.start + step * self.batch_size
        return self.order.sequences(first, first + self.batch_size)


def order_of(
    source: Source,
    *,
    seed: int,
    window: int | None = None,
    sequences: int | None = None,
    selection: Selection | None = None,
) -> StreamOrder:
    """The order in which a run reads `source`.

    Args:
        source: what is read.
        seed: key of the order.
        window: shards mixed at a time; None: all of them, or what the local directory of a remote cache holds.
        sequences: read only the first so many sequences.
        selection: weights of these sequences (docs/selection.md); None: each once an epoch.

    Raises:
        InputError: no sequence, a window of less than one shard, or a selection of other sequences.
    """
    window = source.default_window if window is None else window
    return StreamOrder(source.lengths, seed=seed, window=window, sequences=sequences, selection=selection)


def batch_of(
    tokens_BL1: npt.NDArray[np.integer],
    targets: storage_targets.SparseTargets,
    starts_BL1: npt.NDArray[np.bool_] | None,
    *,
    with_targets: bool = True,
) -> Batch:
    """Sequences of a cache as a batch; rows outside the loss mask, which keep nothing, have no label.

    Args:
        tokens_BL1: token ids.
        targets: of their rows.
        starts_BL1: tokens that begin a document, where the packing has any.
        with_targets: False leaves them out.
    """
    batch, found = _split(tokens_BL1), to_torch(targets)
    mask_BL = (found.offsets.diff() > 0).view_as(batch.labels_BL)
    return Batch(
        batch.tokens_BL,
        batch.labels_BL.masked_fill(~mask_BL, IGNORED),
        mask_BL,
        found if with_targets else None,
        None if starts_BL1 is None else torch.from_numpy(positions_of(starts_BL1)),
    )


def loader_of(
    source: Source, order: OrderSampler, *, workers: int, collate: Callable[[Batch], Any] | None = None
) -> DataLoader[Any]:
    """The batches of a source in an order.

    Args:
        source: what is read.
        order: which sequences, a batch at a time.
        workers: processes that read and decode; 0: this one.
        collate: makes a batch into what the loader gives; None: as it is.
    """
    return DataLoader(
        source,  # type: ignore[arg-type]  # __getitems__ is the loader's own protocol
        batch_sampler=order,
        collate_fn=collate or as_is,  # type: ignore[arg-type]  # __getitems__ hands it one batch
        num_workers=workers,
        # Connections and their threads do not live through a fork.
        multiprocessing_context="spawn" if workers and _remote(source) else None,
        # One of its own: the loader would otherwise draw a seed from the global one, and dropout after a resume would differ.
        generator=torch.Generator(),
    )


def as_is(batch: Batch) -> Batch:
    """The `collate_fn` of these datasets: `__getitems__` has collated already."""
    return batch


def to_torch(targets: storage_targets.SparseTargets) -> SparseTargets:
    """The torch twin of targets read from a cache."""
    return SparseTargets(
        offsets=_tensor(targets.offsets),
        ids=_tensor(targets.ids),
        weights=_tensor(targets.weights),
        label_logp=_tensor(targets.label_logp),
        entropy=_tensor(targets.entropy),
        logp=None if targets.logp is None else _tensor(targets.logp),
    )


def _remote(source: Any) -> bool:
    """Whether a cache behind the source, or behind the one it is put around, is remote."""
    if hasattr(source, "inner"):
        return _remote(source.inner)
    return any(isinstance(c, RemoteCache) for c in getattr(source, "caches", [getattr(source, "cache", None)]))


def _tensor(array: npt.NDArray[np.generic]) -> torch.Tensor:
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))  # copies memory-mapped bytes only


def _split(tokens_BL1: npt.NDArray[np.integer]) -> Batch:
    tokens = torch.from_numpy(tokens_BL1.astype(np.int64))
    labels_BL = tokens[:, 1:].contiguous()
    return Batch(tokens[:, :-1].contiguous(), labels_BL, torch.ones_like(labels_BL, dtype=torch.bool))
