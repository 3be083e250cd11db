"""The order in which a run reads the sequences of a cache, and its state.

The order is endless: epoch e is the positions `e * size ... (e + 1) * size - 1`. In every epoch the shards are permuted
and dealt into windows of at most W shards; inside a window all sequences are permuted. So at any position W shards hold
all that is read until the window ends, a remote cache is fetched shard by shard, and with W = all shards the order is one
permutation of everything. What stands at a position is a pure function of (seed, position): nothing is kept but the
position, and neither processes, workers nor batch size change the order.

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

STATE_SCHEMA: Final = 1
_SHARD_ORDER: Final = 1 << 63  # `part` of the shards' own permutation; windows count from 1


class Window(NamedTuple):
    """A run of the order that reads few shards: positions `start ... stop - 1`, and the `places` of its shards."""

    start: int
    stop: int
    places: tuple[int, ...]


class _Epoch(NamedTuple):
    """How one epoch is dealt: `first_I1` is the position (in the epoch) at which each window starts, then the size."""

    first_I1: npt.NDArray[np.int64]
    places_I: list[npt.NDArray[np.int64]]


@final
class StreamOrder:
    """Order of the sequences of some shards.

    Args:
        lengths: sequences of each shard; sequence numbers run through them in this order (`Cache.lengths`).
        seed: key of the order.
        window: W, how many shards are read at a time; None: all of them.
        sequences: read only the first so many sequences; None: all of them.

    Raises:
        InputError: there is no sequence, or a window of less than one shard.
    """

    def __init__(
        self, lengths: Iterable[int], *, seed: int, window: int | None = None, sequences: int | None = None
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
        self.seed: Final = seed
        self.shards: Final = len(lengths_S)
        self.window: Final = self.shards if window is None else min(window, self.shards)
        self.size: Final = int(lengths_S.sum())
        self._lengths_S: Final = lengths_S
        self._starts_S: Final = np.cumsum(lengths_S) - lengths_S
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
            epoch, within = divmod(start, self.size)
            dealt = self._deal(epoch)
            window = int(np.searchsorted(dealt.first_I1, within, side="right")) - 1
            first, end = (epoch * self.size + int(edge) for edge in dealt.first_I1[window : window + 2])
            until = min(stop, end)
            parts.append(self._in_window(epoch, window, dealt, np.arange(start - first, until - first)))
            start = until
        return np.concatenate(parts)

    def window_at(self, position: int) -> Window:
        """The window that holds `position`; the next one is `window_at(window.stop)`."""
        epoch, within = divmod(position, self.size)
        dealt = self._deal(epoch)
        index = int(np.searchsorted(dealt.first_I1, within, side="right")) - 1
        start, stop = (epoch * self.size + int(edge) for edge in dealt.first_I1[index : index + 2])
        return Window(start, stop, tuple(dealt.places_I[index].tolist()))

    def state_dict(self, position: int, *, manifest: str) -> dict[str, int | str]:
        """All there is to know to go on at `position` of the endless order; plain JSON.

        Args:
            position: of the next sequence to read.
            manifest: hash of what the sequences are (`CacheDataset.fingerprint`).
        """
        epoch, within = divmod(position, self.size)
        return {"schema": STATE_SCHEMA, "epoch": epoch, "position": within, **self._identity(manifest)}

    def position_of(self, state: Mapping[str, Any], *, manifest: str) -> int:
        """Inverse of `state_dict`: the position in the endless order.

        Raises:
            InputError: the state is of another order, another cache or a newer version.
        """
        wanted = {"schema": STATE_SCHEMA, **self._identity(manifest)}
        for name, value in wanted.items():
            if state.get(name) != value:
                raise InputError(
                    f"the state of the data order has {name} {state.get(name)!r}, this run has {value!r}: "
                    "go on with the settings and the cache it was saved with, or start anew"
                )
        epoch, within = state.get("epoch"), state.get("position")
        if type(epoch) is not int or type(within) is not int or epoch < 0 or not 0 <= within < self.size:
            raise InputError(
                f"the state of the data order stands at epoch {epoch!r}, position {within!r}, wanted a position below "
                f"{self.size}: it is damaged, start anew"
            )
        return epoch * self.size + within

    def _identity(self, manifest: str) -> dict[str, int | str]:
        return {"seed": self.seed, "window": self.window, "sequences": self.size, "manifest": manifest}

    def _deal_epoch(self, epoch: int) -> _Epoch:
        windows = -(-self.shards // self.window)
        place_S = np.arange(self.shards)
        if windows > 1:
            place_S = shuffle(self.shards, seed=self.seed, epoch=epoch, part=_SHARD_ORDER)
        places_I = np.array_split(place_S, windows)  # as even as can be: no small window at the end
        lengths_I = np.array([int(self._lengths_S[place_W].sum()) for place_W in places_I])
        return _Epoch(np.concatenate([[0], np.cumsum(lengths_I)]), places_I)

    def _in_window(
        self, epoch: int, window: int, dealt: _Epoch, within_P: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        size = int(dealt.first_I1[window + 1] - dealt.first_I1[window])
        if len(dealt.places_I) == 1:
            return permute(within_P, size=size, seed=self.seed, epoch=epoch)
        drawn_P = permute(within_P, size=size, seed=self.seed, epoch=epoch, part=window + 1)
        place_W = dealt.places_I[window]
        end_W = np.cumsum(self._lengths_S[place_W])
        shift_W = self._starts_S[place_W] - end_W + self._lengths_S[place_W]
        drawn_P += shift_W[np.searchsorted(end_W, drawn_P, side="right")]
        return drawn_P
