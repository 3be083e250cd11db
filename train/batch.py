"""What a training step reads, and how it comes from a loader's worker: in one piece of shared memory.

Left to itself, each of a batch's eight or nine tensors travels alone: a file of its own, a connection between the processes
to pass its descriptor, a map. That takes longer than reading the batch.

Shapes: `B` sequences, `L` positions.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import Any, Final

import torch

from stillroom.kernels.targets import SparseTargets


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences for one forward pass; all tensors on one device.

    Attributes:
        tokens_BL: int64, what the model reads.
        labels_BL: int64, the token after each; -100 outside the loss mask.
        mask_BL: bool, rows that count.
        targets: of the B * L rows, sequence by sequence; None where the source has tokens only.
        positions_BL: int64, starting again at every document, which the model is to read on its own; None where sequences are
            read whole.
        weight_BL: float32, the user's factor of each row; None where there is none.
    """

    tokens_BL: torch.Tensor
    labels_BL: torch.Tensor
    mask_BL: torch.Tensor
    targets: SparseTargets | None = None
    positions_BL: torch.Tensor | None = None
    weight_BL: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.tokens_BL.to(device, non_blocking=True),
            self.labels_BL.to(device, non_blocking=True),
            self.mask_BL.to(device, non_blocking=True),
            None if self.targets is None else self.targets.to(device, non_blocking=True),
            None if self.positions_BL is None else self.positions_BL.to(device, non_blocking=True),
            None if self.weight_BL is None else self.weight_BL.to(device, non_blocking=True),
        )

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What the model is called with."""
        positions = {} if self.positions_BL is None else {"position_ids": self.positions_BL}
        return {"input_ids": self.tokens_BL, **positions}


_ALIGNMENT: Final = 64
# In a worker three threads take turns: one reads, one pickles, one passes descriptors on. Python lets the first hold up the
# others for 5 ms at a time, which is as long as a batch takes to read.
_TURN_S: Final = 2e-4
_BATCH: Final = ("tokens_BL", "labels_BL", "mask_BL", "positions_BL", "weight_BL")
_TARGETS: Final = ("offsets", "ids", "weights", "label_logp", "entropy", "logp")

Place = tuple[int, torch.dtype, tuple[int, ...]] | None  # first byte, dtype and shape of a tensor; None for no tensor


def _reduce(batch: Batch) -> tuple[Any, tuple[Any, int, list[Place]]]:
    """What pickle is to send of `batch`: a file without a name, and where in it each of its tensors lies.

    The file is written, not mapped, so the kernel fills its pages in one go; its memory goes when the last process lets go.
    """
    if parent_process() is not None:
        sys.setswitchinterval(_TURN_S)
    tensors: list[torch.Tensor | None] = [getattr(batch, name) for name in _BATCH]
    if batch.targets is not None:
        tensors += [getattr(batch.targets, name) for name in _TARGETS]
    places: list[Place] = []
    end = 0
    file = os.memfd_create("stillroom-batch")
    try:
        for tensor in tensors:
            if tensor is None:
                places.append(None)
                continue
            places.append((end, tensor.dtype, tuple(tensor.shape)))
            data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
            written = 0
            while written < len(data):  # one call writes 2 GiB at most
                written += os.pwrite(file, data[written:], end + written)
            end += -(-len(data) // _ALIGNMENT) * _ALIGNMENT
        os.truncate(file, max(end, 1))
        return _rebuild, (DupFd(file), max(end, 1), places)
    finally:
        os.close(file)


def _rebuild(passed: Any, size: int, places: list[Place]) -> Batch:
    file = passed.detach()
    try:
        whole = torch.frombuffer(mmap.mmap(file, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE), dtype=torch.uint8)
    finally:
        os.close(file)
    views: list[Any] = []
    for place in places:
        if place is None:
            views.append(None)
            continue
        start, dtype, shape = place
        views.append(whole[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape))
    tokens_BL, labels_BL, mask_BL, positions_BL, weight_BL, *rest = views
    return Batch(tokens_BL, labels_BL, mask_BL, SparseTargets(*rest) if rest else None, positions_BL, weight_BL)


if hasattr(os, "memfd_create"):  # Linux; elsewhere each tensor travels alone
    ForkingPickler.register(Batch, _reduce)
