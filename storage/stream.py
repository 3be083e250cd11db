"""The order in which a run reads the sequences of a cache, and its state.

The order is endless: epoch e is the positions `e * size ... (e + 1) * size - 1`. In every epoch the shards are permuted
and dealt into windows of at most W shards; inside a window all sequences are permuted. So at any position W shards hold
all that is read until the window ends, a remote cache is fetched shard by shard, and with W = all shards the order is one
permutation of everything. What stands at a position is a pure function of (seed, position): nothing is kept but the
position, and neither processes, workers nor batch size change the order.

With a `Selection` sequences stand in an epoch more than once or not at all, and its curriculum's stages come before the
first epoch; shards without a visit drop out of a round. All the above stays.

Shapes: `P` positions, `S` shards at hand, `W` shards of a window, `I` windows of an epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, Final, NamedTuple, final

import numpy as np
import numpy.typing as npt

from stillroom.storage.errors import InputError
from stillroom.storage.order import permute, shuffle
from stillroom.storage.selection import Round, Selection, Visits

STATE_SCHEMA: Final = 1
_SHARD_ORDER: Final = 1 << 63  # `part` of the shards' own permutation; windows count from 1


class Window(NamedTuple):
    """A run of the order that reads few shards: positions `start ... stop - 1`, and the `places` of its shards."""

    start: int
    stop: int
    places: tuple[int, ...]


class _Epoch(NamedTuple):
    """How one epoch is dealt.

    `first_I1` is the position (in the epoch) at which each window starts, then the size; `lengths_S` and `starts_S` are those
    of the shards' visits, and `visits` the sequence of each of them where a selection says so.
    """

    first_I1: npt.NDArray[np.int64]
    places_I: list[npt.NDArray[np.int64]]
    lengths_S: npt.NDArray[np.int64]
    starts_S: npt.NDArray[np.int64]
    visits: npt.NDArray[Any] | None


@final
class StreamOrder:
    """Order of the sequences of some shards.

    Args:
        lengths: sequences of each shard; sequence numbers run through them in this order (`Cache.lengths`).
        seed: key of the order.
        window: W, how many shards are read at a time; None: all of them.
        sequences: read only the first so many sequences; None: all of them.
        selection: weights of these sequences; None: each once an epoch.

    Attributes:
        size: positions of an epoch.
        shards: how many have a sequence that is read.
        window: W.

    Raises:
        InputError: there is no sequence, a window of less than one shard, or a selection of other sequences.
    """

    def __init__(
        self,
        lengths: Iterable[int],
        *,
        seed: int,
        window: int | None = None,
        sequences: int | None = None,
        selection: Selection | None = None,
    ) -> None:
        lengths_S = np.fromiter(lengths, np.int64)
        if sequences is not None:  # shards beyond the first so many sequences drop out, the last one may be cut
            lengths_S = np.diff(np.minimum(np.cumsum(lengths_S), sequences), prepend=0)
            lengths_S = lengths_S[lengths_S > 0]
        if not len(lengths_S):
            raise InputError(
                "no sequence is at hand, so there is nothing to put in order: give a cache that holds some"
            )
        if window is not None and window < 1:
            raise InputError(f"window came as {window} shards, wanted at least 1: leave it out to mix all of them")
        ends_S = np.cumsum(lengths_S)
        read_S = lengths_S
        if selection is not None:
            if len(selection.weight_S) != ends_S[-1]:
                raise InputError(
                    f"the selection has weights of {len(selection.weight_S)} sequences, and {ends_S[-1]} are at hand: make it "
                    "for this cache and as many sequences"
                )
            read_S = _by_shard(selection.weight_S > 0, ends_S)
        self.seed: Final = seed
        self.shards: Final = int(np.count_nonzero(read_S)) if selection is not None else len(lengths_S)
        self.window: Final = self.shards if window is None else min(window, self.shards)
        self.size: Final = int(ends_S[-1]) if selection is None else selection.size
        self.selection: Final = None if selection is None else selection.digest
        self._visits: Final = None if selection is None else Visits(selection, seed)
        self._lengths_S: Final = lengths_S
        self._ends_S: Final = ends_S
        self._deal = lru_cache(maxsize=4)(self._deal_epoch)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_deal"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._deal = lru_cache(maxsize=4)(self._deal_epoch)

    def sequences(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Sequence numbers at positions `start ... stop - 1` of the endless order, `[stop - start]` int64."""
        parts = [np.zeros(0, np.int64)]
        while start < stop:
            turn = self._round_at(start)
            dealt = self._deal(turn.number)
            window = int(np.searchsorted(dealt.first_I1, start - turn.start, side="right")) - 1
            first, end = (turn.start + int(edge) for edge in dealt.first_I1[window : window + 2])
            until = min(stop, end)
            parts.append(self._in_window(turn.number, window, dealt, np.arange(start - first, until - first)))
            start = until
        return np.concatenate(parts)

    def window_at(self, position: int) -> Window:
        """The window that holds `position`; the next one is `window_at(window.stop)`."""
        turn = self._round_at(position)
        dealt = self._deal(turn.number)
        index = int(np.searchsorted(dealt.first_I1, position - turn.start, side="right")) - 1
        start, stop = (turn.start + int(edge) for edge in dealt.first_I1[index : index + 2])
        return Window(start, stop, tuple(dealt.places_I[index].tolist()))

    def state_dict(self, position: int, *, manifest: str) -> dict[str, int | str]:
        """All there is to know to go on at `position` of the endless order; plain JSON.

        Args:
            position: of the next sequence to read.
            manifest: hash of what the sequences are (`CacheDataset.fingerprint`).
        """
        turn = self._round_at(position)
        state = {"schema": STATE_SCHEMA, "epoch": turn.number, "position": position - turn.start}
        selected = {} if self.selection is None else {"selection": self.selection}
        return {**state, **self._identity(manifest), **selected}

    def position_of(self, state: Mapping[str, Any], *, manifest: str) -> int:
        """Inverse of `state_dict`: the position in the endless order.

        Raises:
            InputError: the state is of another order, another cache or a newer version.
        """
        wanted = {"schema": STATE_SCHEMA, **self._identity(manifest), "selection": self.selection}
        for name, value in wanted.items():
            if state.get(name) != value:
                raise InputError(
                    f"the state of the data order has {name} {state.get(name)!r}, this run has {value!r}: "
                    "go on with the settings and the cache it was saved with, or start anew"
                )
        epoch, within = state.get("epoch"), state.get("position")
        turn = self._round(epoch) if type(epoch) is int and epoch >= 0 else None
        if turn is None or type(within) is not int or not 0 <= within < turn.size:
            raise InputError(
                f"the state of the data order stands at epoch {epoch!r}, position {within!r}, wanted a position below "
                f"{self.size if turn is None else turn.size}: it is damaged, start anew"
            )
        return turn.start + within

    def _identity(self, manifest: str) -> dict[str, int | str]:
        return {"seed": self.seed, "window": self.window, "sequences": self.size, "manifest": manifest}

    def _round(self, number: int) -> Round:
        return Round(number, number * self.size, self.size) if self._visits is None else self._visits.round(number)

    def _round_at(self, position: int) -> Round:
        return self._round(position // self.size) if self._visits is None else self._visits.round_at(position)

    def _deal_epoch(self, epoch: int) -> _Epoch:
        lengths_S = self._lengths_S
        visits: npt.NDArray[Any] | None = None
        place_S = np.arange(len(lengths_S))
        if self._visits is not None:
            visit_S = self._visits.of(epoch)
            lengths_S = _by_shard(visit_S, self._ends_S)
            number = np.int32 if len(visit_S) < 1 << 31 else np.int64
            visits = np.repeat(np.arange(len(visit_S), dtype=number), visit_S)
            place_S = np.flatnonzero(lengths_S)
        windows = -(-len(place_S) // self.window)
        if windows > 1:
            place_S = place_S[shuffle(len(place_S), seed=self.seed, epoch=epoch, part=_SHARD_ORDER)]
        places_I = np.array_split(place_S, windows)  # as even as can be: no small window at the end
        lengths_I = np.array([int(lengths_S[place_W].sum()) for place_W in places_I])
        first_I1 = np.concatenate([[0], np.cumsum(lengths_I)])
        return _Epoch(first_I1, places_I, lengths_S, np.cumsum(lengths_S) - lengths_S, visits)

    def _in_window(
        self, epoch: int, window: int, dealt: _Epoch, within_P: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        size = int(dealt.first_I1[window + 1] - dealt.first_I1[window])
        if len(dealt.places_I) == 1:
            drawn_P = permute(within_P, size=size, seed=self.seed, epoch=epoch)
        else:
            drawn_P = permute(within_P, size=size, seed=self.seed, epoch=epoch, part=window + 1)
            place_W = dealt.places_I[window]
            end_W = np.cumsum(dealt.lengths_S[place_W])
            shift_W = dealt.starts_S[place_W] - end_W + dealt.lengths_S[place_W]
            drawn_P += shift_W[np.searchsorted(end_W, drawn_P, side="right")]
        return drawn_P if dealt.visits is None else dealt.visits[drawn_P].astype(np.int64)


def _by_shard(value_S: npt.NDArray[Any], ends_S: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Sums over the sequences of each shard, which end at `ends_S`."""
    return np.diff(np.concatenate([[0], np.cumsum(value_S, dtype=np.int64)])[ends_S], prepend=0)
