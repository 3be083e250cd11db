"""Who shares a vocabulary: one process, or a group of them.

Everything that travels is a maximum or a whole number, so the result does not depend on the order of a reduction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Ranks(Protocol):
    """Processes that call the same steps in the same order."""

    rank: int
    size: int

    def maximum(self, values: Tensor) -> Tensor:
        """Largest of each element, no NaN among them."""
        ...

    def total(self, values: Tensor) -> Tensor:
        """Sum of each element, int64."""
        ...

    def gather(self, values: Tensor) -> Tensor:
        """`[R, ...]`: everybody's tensor, in the order of the ranks."""
        ...


class Alone:
    """One process with the whole vocabulary."""

    rank = 0
    size = 1

    def maximum(self, values: Tensor) -> Tensor:
        """The same."""
        return values

    def total(self, values: Tensor) -> Tensor:
        """The same."""
        return values

    def gather(self, values: Tensor) -> Tensor:
        """The same, `[1, ...]`."""
        return values.unsqueeze(0)


class Processes:
    """The processes of a `torch.distributed` group; None is the default group.

    Raises:
        ValueError: no process group was set up, or this process is not in it.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                "`group` needs a process group, and none is set up: call torch.distributed.init_process_group"
            )
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("`group` came without this process in it: call from its members only")
        self._group, self._dist = group, dist

    def maximum(self, values: Tensor) -> Tensor:
        """Largest of each element."""
        values = values.contiguous()
        self._dist.all_reduce(values, self._dist.ReduceOp.MAX, self._group)
        return values

    def total(self, values: Tensor) -> Tensor:
        """Sum of each element."""
        values = values.contiguous()
        self._dist.all_reduce(values, self._dist.ReduceOp.SUM, self._group)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Everybody's tensor, stacked."""
        parts = [torch.empty_like(values) for _ in range(self.size)]
        self._dist.all_gather(parts, values.contiguous(), self._group)
        return torch.stack(parts)
