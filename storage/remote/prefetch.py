"""Fetching ahead of need: threads that follow the order and keep the shards of this and the next windows here."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from typing import Final, final

from stillroom.storage.errors import StillroomError
from stillroom.storage.remote.local import FullError
from stillroom.storage.stream import StreamOrder

logger = logging.getLogger(__name__)

_THREADS: Final = 2  # each fetches a shard's objects with threads of its own
_LOOK_AGAIN_S: Final = 0.5
_AHEAD: Final = 2  # shards beyond the next window that may be fetched: with small windows one download hides another
Fetch = Callable[[int, Collection[int]], None]


@final
class Prefetcher:
    """Follows a position through an order; close it, or use it as a context manager.

    Args:
        order: of the sequences.
        places: shard at each place of the order.
        fetch: called from a thread with a shard to fetch and all that will be needed soon; raises `FullError` where there is no
            room for it now.
    """

    def __init__(self, order: StreamOrder, places: tuple[int, ...], fetch: Fetch) -> None:
        self._order, self._places, self._fetch = order, places, fetch
        self._change = threading.Condition()
        self._position: int | None = None
        self._wanted: list[int] = []
        self._taken: set[int] = set()  # fetched, being fetched, or failed (the reader will meet the error itself)
        self._closed = False
        self._threads: list[threading.Thread] = []

    def advance(self, position: int) -> None:
        """The next sequence to be read is the one at `position`."""
        window = self._order.window_at(position)
        with self._change:
            if self._closed or window.start == self._position:
                return
            self._position = window.start
            places = list(window.places)
            many = 2 * len(places) + _AHEAD
            while len(places) < min(many, 2 * self._order.shards):
                window = self._order.window_at(window.stop)
                places += window.places
            self._wanted = list(dict.fromkeys(self._places[place] for place in places[:many]))
            self._taken &= set(self._wanted)
            self._change.notify_all()
            if not self._threads:  # not before the first call: a loader forks its workers until then
                self._threads = [
                    threading.Thread(target=self._run, name=f"stillroom-prefetch-{i}", daemon=True)
                    for i in range(_THREADS)
                ]
                for thread in self._threads:
                    thread.start()

    def close(self) -> None:
        """Stop; a download under way is finished first."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while (shard := self._next()) is not None:
            try:
                self._fetch(shard, frozenset(self._wanted))
            except FullError:
                with self._change:
                    self._taken.discard(shard)
                    if not self._closed:
                        self._change.wait(_LOOK_AGAIN_S)
            except StillroomError as error:
                logger.warning("shard %d was not fetched ahead: %s", shard, error)

    def _next(self) -> int | None:
        with self._change:
            while not self._closed:
                for shard in self._wanted:
                    if shard not in self._taken:
                        self._taken.add(shard)
                        return shard
                self._change.wait()
            return None
