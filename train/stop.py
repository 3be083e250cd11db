"""SIGTERM and Ctrl-C: finish the step in hand, save a checkpoint, leave. The same command goes on from there.

Schedulers send SIGTERM and, 30 seconds later (torchrun, SLURM and Kubernetes by default), SIGKILL. A second signal, or one before
the first step, ends the run at once; then the last checkpoint is what is left.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Final, Self, final

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """The run was asked to stop. Like Ctrl-C it passes through `except Exception`, and is no error of the run.

    Attributes:
        status: of the process: 143 after SIGTERM, 130 after SIGINT.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.status = 128 + number


@final
class Stop:
    """Turns the two signals into an orderly end while it is entered. Does nothing outside the main thread, where none come.

        with Stop() as stop:
            train_student(config, stop=stop)

    Attributes:
        working: whether there is a step to finish; until there is, a signal ends the run at once.
        number: the signal that came, 0 for none.
    """

    def __init__(self) -> None:
        self.working = False
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.number or not self.working:
            raise Stopped(number)
        self.number = number
