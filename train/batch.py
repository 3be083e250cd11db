"""What a training step reads, and how it comes from a loader's worker: in one piece of shared memory.

Left to itself, each of a batch's eight or nine tensors travels alone: a file of its own, a connection between the processes
to pass its descriptor, a map. That takes longer than reading the batch.

Shapes: `B` sequences, `L` positions.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.reduction import ForkingPickler
from typing import Any, Final, cast

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
    """

    tokens_BL: torch.Tensor
    labels_BL: torch.Tensor
    mask_BL: torch.Tensor
    targets: SparseTargets | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.tokens_BL.to(device, non_blocking=True),
            self.labels_BL.to(device, non_blocking=True),
            self.mask_BL.to(device, non_blocking=True),
            None if self.targets is None else self.targets.to(device, non_blocking=True),
        )


_ALIGNMENT: Final = 64
# In a worker three threads take turns: one reads, one pickles, one passes descriptors on. Python lets the first hold up the
# others for 5 ms at a time, which is as long as a batch takes to read.
_TURN_S: Final = 2e-4
_BATCH: Final = ("tokens_BL", "labels_BL", "mask_BL")
_TARGETS: Final = ("offsets", "ids", "weights", "label_logp", "entropy", "logp")

Place = tuple[int, torch.dtype, tuple[int, ...]] | None  # first byte, dtype and shape of a tensor; None for no tensor


def _reduce(batch: Batch) -> tuple[Any, tuple[torch.Tensor, list[Place]]]:
    """What pickle is to send of `batch`: one shared tensor of bytes, and where in it each of its tensors lies."""
    if parent_process() is not None:
        sys.setswitchinterval(_TURN_S)
    tensors = [getattr(batch, name) for name in _BATCH]
    if batch.targets is not None:
        tensors += [getattr(batch.targets, name) for name in _TARGETS]
    places: list[Place] = []
    end = 0
    for tensor in tensors:
        if tensor is None:
            places.append(None)
            continue
        places.append((end, tensor.dtype, tuple(tensor.shape)))
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    whole = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(max(end, 1)))  # type: ignore[no-untyped-call]
    for tensor, view in zip(tensors, _views(whole, places)):
        if view is not None:
            view.copy_(tensor)
    return _rebuild, (whole, places)


def _rebuild(whole: torch.Tensor, places: list[Place]) -> Batch:
    tokens_BL, labels_BL, mask_BL, *rest = cast(list[torch.Tensor], _views(whole, places))
    return Batch(tokens_BL, labels_BL, mask_BL, SparseTargets(*rest) if rest else None)


def _views(whole: torch.Tensor, places: list[Place]) -> list[torch.Tensor | None]:
    views: list[torch.Tensor | None] = []
    for place in places:
        if place is None:
            views.append(None)
            continue
        start, dtype, shape = place
        size = dtype.itemsize
        for length in shape:
            size *= length
        views.append(whole[start : start + size].view(dtype).view(shape))
    return views


ForkingPickler.register(Batch, _reduce)
