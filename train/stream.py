"""`Stream`: batches of a cache for any training loop, with a state of one small dict.

Shapes: `B` sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, final

from stillroom.storage.cache import Cache
from stillroom.storage.errors import InputError
from stillroom.storage.selection import Selection
from stillroom.train.batch import Batch
from stillroom.train.data import CacheDataset, OrderSampler, Source, loader_of, order_of


@final
class Stream:
    """The batches of a run in their order; goes on where its state says.

    Iterating takes up at the current position. The position counts what was handed out, however far the workers are ahead,
    so a state taken in the middle of a loop is that after the current batch.

    Args:
        source: an open cache, or a `Source`.
        batch_size: sequences per batch over all ranks.
        seed: key of the order.
        steps: batches from the beginning of the run to its end; None: endless.
        window: shards mixed at a time; None: all of a cache on disk, of a remote one what its local directory holds.
        sequences: read only the first so many sequences.
        selection: weights of these sequences (docs/selection.md); None: each once an epoch.
        rank, ranks: which slice of every batch this process gets, and of how many.
        workers: processes that read and decode; 0: this one.
        with_targets: False leaves `Batch.targets` empty (of a cache).

    Raises:
        InputError: settings that do not fit.
    """

    def __init__(
        self,
        source: Cache | Source,
        *,
        batch_size: int,
        seed: int,
        steps: int | None = None,
        window: int | None = None,
        sequences: int | None = None,
        selection: Selection | None = None,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
        with_targets: bool = True,
    ) -> None:
        if not 0 <= rank < ranks:
            raise InputError(f"rank came as {rank} of {ranks}, wanted 0 to {ranks - 1}")
        if batch_size < ranks:
            raise InputError(
                f"batch_size is {batch_size} sequences for {ranks} ranks, wanted one each at least: raise it"
            )
        self.source: Source = CacheDataset(source, with_targets=with_targets) if isinstance(source, Cache) else source
        self.order = order_of(self.source, seed=seed, window=window, sequences=sequences, selection=selection)
        self.batch_size, self.steps, self.workers = batch_size, steps, workers
        self.rank, self.ranks = rank, ranks
        self.position = 0
        self._fingerprint = self.source.fingerprint
        self.source.follow(self.order)  # refuses a window for which there is no room

    def __len__(self) -> int:
        """Batches still to come.

        Raises:
            TypeError: the stream is endless.
        """
        if self.steps is None:
            raise TypeError("a stream without `steps` has no length")
        return max(0, self.steps * self.batch_size - self.position) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        sampler = OrderSampler(
            self.order,
            batch_size=self.batch_size,
            steps=(1 << 62) // self.batch_size if self.steps is None else len(self),
            rank=self.rank,
            ranks=self.ranks,
            start=self.position,
            follow=self.source.follow,
        )
        for batch in loader_of(self.source, sampler, workers=self.workers):
            self.position += self.batch_size
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands: schema, seed, epoch, position, window, sequences, manifest hash. Plain JSON."""
        return self.order.state_dict(self.position, manifest=self._fingerprint)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; batch size, ranks and workers may differ from then.

        Raises:
            InputError: the state is of another seed, window or cache.
        """
        self.position = self.order.position_of(state, manifest=self._fingerprint)
