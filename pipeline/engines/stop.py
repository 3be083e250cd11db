"""SIGTERM: finish the shard in hand if that is quick, else leave it to its journal; leave with status 143.

Schedulers send SIGTERM and, 30 seconds later (torchrun, SLURM and Kubernetes by default), SIGKILL. So the shard in hand gets
20 seconds; a second SIGTERM leaves it at once. What came from the teacher is kept either way. Before the first shard there is
nothing to finish.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Final, Self

GRACE_S: Final = 20.0
STATUS: Final = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Like Ctrl-C it passes through `except Exception`, and is no error of the run."""

    status = STATUS  # of the process


class Stop:
    """Turns SIGTERM into an orderly end while it is entered. Does nothing outside the main thread, where no signals come.

        with Stop() as stop:
            run_shards(prepared, stop.while_wanted(shards))
            stop.check()

    Args:
        grace_s: seconds the shard in hand may take.
        unless: asked before each shard; True is as good as SIGTERM.
    """

    def __init__(self, grace_s: float = GRACE_S, unless: Callable[[], bool] = lambda: False) -> None:
        self.came = False
        self._grace_s: Final = grace_s
        self._unless: Final = unless
        self._working = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
            signal.signal(signal.SIGTERM, self._terminate)
            signal.signal(signal.SIGALRM, self._drop)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]  # as it came
        self._before = {}

    def while_wanted(self, shards: Iterable[int]) -> Iterator[int]:
        """`shards`, until SIGTERM comes: then no further one, and the one in hand has `grace_s` seconds.

        Raises:
            Terminated: in whatever the main thread is doing, when they are over.
        """
        source = iter(shards)
        while not self.came:
            self._working = False  # between shards, or waiting for those of others: nothing to finish
            try:
                shard = next(source)
            except StopIteration:
                break
            finally:
                self._working = True
            self.came = self.came or self._unless()
            if self.came:
                break
            yield shard

    def check(self) -> None:
        """Leave if SIGTERM came.

        Raises:
            Terminated: it did.
        """
        if self.came:
            raise Terminated

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        if self.came or not self._working:
            self.came = True
            raise Terminated
        self.came = True
        signal.setitimer(signal.ITIMER_REAL, self._grace_s)

    def _drop(self, number: int, frame: FrameType | None) -> None:
        raise Terminated
