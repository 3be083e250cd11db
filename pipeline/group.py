"""Processes that hold one teacher together (`--tensor-parallel`): each a slice of its matrices, all at the same batch.

The first of them leads: it alone has corpus and cache, and tells the others what to do beside it (`tell`), once for every
shard. What they then exchange inside a batch is the hub library's and the sampler's business. `engines.joined` puts the
processes together and ends them together.

Shapes: `R` processes, `N` rows, `C` columns of the logits held here, `V` all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional

if TYPE_CHECKING:
    from stillroom.pipeline.teacher import Teacher

# The leader may pack a corpus for hours, or wait for other workers' shards, before it tells anything.
PATIENCE: Final = timedelta(days=30)


class Group:
    """This process and the others of its group, which is the whole world of its `torch.distributed`.

    Attributes:
        rank: 0 leads.
        size: R.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._told = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._host = torch.device("cpu")

    def tell(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Have the others do `work(teacher, *arguments, **options)`, which the leader goes on to do itself.

        Does nothing in the others. Only processes of one command talk here, over the group's own connections.

        Args:
            work: a function of a module, so that it can be named.
            arguments, options: its own, small: they travel.
        """
        if self.rank == 0:
            dist.broadcast_object_list([(work, arguments, options)], 0, self._told, self._host)

    def dismiss(self) -> None:
        """Let the others out of `follow`."""
        dist.broadcast_object_list([None], 0, self._told, self._host)

    def follow(self, teacher: Teacher) -> None:
        """Do what the leader tells, until it dismisses."""
        while True:
            told: list[Any] = [None]
            dist.broadcast_object_list(told, 0, self._told, self._host)
            if told[0] is None:
                return
            work, arguments, options = told[0]
            work(teacher, *arguments, **options)

    def gathered(self, values: torch.Tensor) -> torch.Tensor:
        """Everybody's tensor of one shape, `[R, ...]`, in the order of the ranks."""
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.stack(parts)

    def edges(self, rows: int, vocabulary: int) -> list[tuple[int, int]]:
        """Ids each process holds of a head of so many rows, cut as the library cuts: even parts, the last one short.

        Args:
            rows: of the head's matrix.
            vocabulary: V, ids in use; rows beyond are left out.
        """
        step = -(-rows // self.size)
        return [(min(rank * step, vocabulary), min((rank + 1) * step, vocabulary)) for rank in range(self.size)]

    def rows_here(self, matrix: torch.Tensor) -> torch.Tensor | None:
        """This process's part of a head's weight or bias, plain; None where the library cut it another way."""
        if not isinstance(matrix, DTensor):
            step = -(-len(matrix) // self.size)
            return matrix[self.rank * step : (self.rank + 1) * step]
        if any(type(cut) is not Shard or cut.dim % matrix.ndim for cut in matrix.placements):
            return None
        return matrix.to_local()

    def whole(self, logits_NC: torch.Tensor, edges: list[tuple[int, int]]) -> torch.Tensor:
        """Logits `[N, V]` of which every process holds the columns that `edges` says."""
        widths = [stop - start for start, stop in edges]
        padded = functional.pad(logits_NC, (0, max(widths) - logits_NC.shape[1]))
        return torch.cat([part[:, :width] for part, width in zip(self.gathered(padded), widths)], dim=1)
