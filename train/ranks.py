"""The processes of one run, and how they agree: on a sum, on a request to stop, on an error.

What one process decides alone is a deadlock of the others: they wait in the next collective for ever. So everything that may
fail in one of them, or that only the first may do, goes through here. Messages go between hosts (gloo): no device is waited for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar, final

import torch
from torch import distributed

from stillroom.storage.errors import InputError, StillroomError

T = TypeVar("T")


@final
class Ranks:
    """This process and its peers.

    Attributes:
        rank: number of this process.
        count: how many there are.
    """

    def __init__(self) -> None:
        self.rank, self.count = 0, 1
        self._group: distributed.ProcessGroup | None = None

    @classmethod
    def join(cls) -> Ranks:
        """Meet the processes that torchrun, accelerate or SLURM's `torchrun` started; without them, this one is all.

        A process group that exists already is used and left.
        """
        found = cls()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 or (distributed.is_available() and distributed.is_initialized()):
            from accelerate import PartialState

            PartialState(cpu=not torch.cuda.is_available())  # nccl on CUDA devices, gloo on CPUs
            found.rank, found.count = distributed.get_rank(), distributed.get_world_size()
        if found.count > 1:
            found._group = distributed.new_group(backend="gloo")
        return found

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def total(self, *values: float) -> tuple[float, ...]:
        """Each value's sum over all processes (float64)."""
        if self._group is None:
            return values
        sums = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(sums, group=self._group)
        return tuple(sums.tolist())

    def each(self, value: T) -> list[T]:
        """The value of every process, in order."""
        if self._group is None:
            return [value]
        found: list[T] = [value] * self.count
        distributed.all_gather_object(found, value, group=self._group)
        return found

    def once(self, work: Callable[[], T]) -> T:
        """What `work` returns in the first process, in all of them; and what it raises there.

        Raises:
            Exception: whatever `work` raised.
        """
        if self._group is None:
            return work()
        told: list[Any] = [None, None]
        if self.first:
            try:
                told[0] = work()
            except Exception as error:
                told[1] = error
        distributed.broadcast_object_list(told, src=0, group=self._group)
        if told[1] is not None:
            raise told[1]
        result: T = told[0]
        return result

    def together(self, work: Callable[[], T]) -> T:
        """What `work` returns here, once it has returned everywhere.

        Raises:
            StillroomError: what it raised here, or that it raised in another process.
        """
        result, failed = None, None
        try:
            result = work()
        except StillroomError as error:
            failed = error
        if self._group is not None:
            said = self.each(None if failed is None else str(failed))
            others = [f"process {rank}: {text}" for rank, text in enumerate(said) if text is not None]
            if others and failed is None:
                failed = InputError(f"another process of the run can not go on ({others[0]})")
        if failed is not None:
            raise failed
        return result  # type: ignore[return-value]  # it is one: nothing was raised
