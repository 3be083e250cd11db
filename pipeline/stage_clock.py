"""Where the time of stage one goes, stage by stage.

On a CPU a stage's seconds are wall time. On CUDA they are the device's own, between two events, read when they have passed:
no stage is waited for. Stages overlap there (and the writer's thread does everywhere), so they may add up to more than the
run took.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

STAGES: Final = ("forward", "head", "sample", "copy", "encode", "commit", "wait")
"""forward: the teacher's body. head: logits. sample: targets. copy: to the host, and into the journal. encode, commit: the
writer's thread. wait: this process had nothing to do but wait for the writer."""


class StageClock:
    """Adds up seconds by stage.

    Args:
        device: where stages run that are timed with `stage`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._events: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def stage(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        """Time what is done inside, on the current stream of `device` (None: the clock's)."""
        device = self._device if device is None else device
        if device.type != "cuda":
            with self.host(name):
                yield
            return
        stream = torch.cuda.current_stream(device)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record(stream)
        yield
        stop.record(stream)
        self._events.append((name, start, stop))
        self._settle(wait=False)

    @contextmanager
    def host(self, name: str) -> Iterator[None]:
        """Time what is done inside by the wall."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start_s

    def add(self, name: str, seconds: float) -> None:
        """Seconds that were measured elsewhere."""
        self._seconds[name] += seconds

    def seconds(self) -> dict[str, float]:
        """By stage, in the order of the work; waits for what is still running on the device."""
        self._settle(wait=True)
        return dict(self._seconds)

    def _settle(self, *, wait: bool) -> None:
        while self._events and (wait or self._events[0][2].query()):  # type: ignore[no-untyped-call]
            name, start, stop = self._events.popleft()
            stop.synchronize()
            self._seconds[name] += start.elapsed_time(stop) / 1000.0
