"""How far a cache is, from its commit records alone: the same for every engine, for a directory and for a URL."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from stillroom.storage.commits import COMMITS, shards_named
from stillroom.storage.depot import Depot
from stillroom.storage.errors import NotACacheError
from stillroom.storage.manifest import MANIFEST_NAME, Manifest

WINDOW_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Seen:
    """A cache at one moment.

    Attributes:
        shards_done, shards: committed, and of the plan.
        rows_done, rows: the same in rows.
        rows_per_s: over the last minute, or since the watch began, or as far back as it takes to see a commit; None before.
        left_s: seconds to the end at this rate; None where there is no rate.
    """

    shards_done: int
    shards: int
    rows_done: int
    rows: int
    rows_per_s: float | None
    left_s: float | None

    @property
    def complete(self) -> bool:
        """Whether every shard is committed."""
        return self.shards_done >= self.shards

    def __str__(self) -> str:
        share = self.rows_done / self.rows if self.rows else 1.0
        parts = [f"{self.shards_done:,}/{self.shards:,} shards", f"{share:.1%} of {self.rows:,} rows"]
        if self.rows_per_s is not None:
            parts.append(f"{self.rows_per_s:,.0f} rows/s")
        if self.left_s is not None and not self.complete:
            hours, rest = divmod(round(self.left_s), 3600)
            parts.append(f"{hours}:{rest // 60:02d}:{rest % 60:02d} left")
        return ", ".join(parts)


class Watch:
    """Looks at a cache again and again. A look is one listing; no record is read.

    Args:
        depot: of the cache.
        clock: seconds; of a test.

    Raises:
        NotACacheError: there is no manifest.
    """

    def __init__(self, depot: Depot, clock: Callable[[], float] = time.monotonic) -> None:
        self._depot: Final = depot
        self._clock: Final = clock
        self._looks: Final = deque[tuple[float, int]]()  # (when, rows done), a window's worth
        try:
            self._manifest: Final = Manifest.from_json(depot.read_json(MANIFEST_NAME))
        except FileNotFoundError:
            raise NotACacheError(f"{depot.name} holds no {MANIFEST_NAME}: name a cache") from None

    def look(self) -> Seen:
        """The cache now.

        Raises:
            CacheError: a store that keeps failing.
        """
        manifest, now = self._manifest, self._clock()
        done = [shard for shard in shards_named(self._depot.names(COMMITS)) if shard < manifest.shards]
        ranges = [manifest.shard_range(shard) for shard in done]
        seq_len = manifest.packing.seq_len
        rows, rows_done = manifest.sequences * seq_len, sum(stop - start for start, stop in ranges) * seq_len
        self._looks.append((now, rows_done))
        # The oldest look stays as long as it is the only one from before the last commit.
        while len(self._looks) > 2 and self._looks[1][0] <= now - WINDOW_S and self._looks[1][1] < rows_done:
            self._looks.popleft()
        then, rows_then = self._looks[0]
        rate = (rows_done - rows_then) / (now - then) if rows_done > rows_then and now > then else None
        return Seen(
            shards_done=len(done),
            shards=manifest.shards,
            rows_done=rows_done,
            rows=rows,
            rows_per_s=rate,
            left_s=(rows - rows_done) / rate if rate else None,
        )
