"""One worker thread behind a bounded queue: the caller goes on while its shards are encoded, hashed and flushed.

numpy's larger loops, Zstandard, SHA-256 and fsync all let other threads run.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Final

import numpy as np

_SCRATCH_BYTES: Final = (32 << 20) - (64 << 10)


@lru_cache(maxsize=1)
def keep_scratch() -> None:
    """Let malloc keep the scratch arrays of a read or write: freeing one array of 32 MB raises glibc's threshold for doing so.

    Below it every array over 128 KB is given back and asked for again, page by page, which takes as long as the work itself.
    """
    np.empty(_SCRATCH_BYTES, np.uint8)


class Background:
    """Runs jobs in the order they come, one at a time, on a thread of its own.

    After a job fails, the rest are dropped and `submit` raises its error until `close`; where it was not asked, `close` does.

    Args:
        waiting: how many jobs may wait besides the one being done; `submit` blocks while there are more.
    """

    def __init__(self, waiting: int) -> None:
        self._jobs: queue.Queue[Callable[[], object] | None] = queue.Queue(maxsize=waiting)
        self._error: BaseException | None = None
        self._told = False
        self._dropping = False
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], object]) -> None:
        """Do `job` later.

        Raises:
            BaseException: what an earlier job raised.
        """
        if self._error is not None:
            self._told = True
            raise self._error
        if self._thread is None:
            # Daemonic, so that an exception that leaves the caller is not followed by a hang; `close` waits for it.
            self._thread = threading.Thread(target=self._run, name="cache writer", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def close(self, *, drop: bool = False) -> None:
        """Wait for what was submitted; with `drop`, only for the job being done.

        Raises:
            BaseException: what a job raised, unless `submit` raised it already or with `drop`.
        """
        self._dropping = self._dropping or drop
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None
        error = None if drop or self._told else self._error
        self._error, self._told, self._dropping = None, False, False
        if error is not None:
            raise error

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._error is None and not self._dropping:
                try:
                    job()
                except BaseException as error:  # handed to the caller, whatever it is
                    self._error = error
            del job  # its arrays
