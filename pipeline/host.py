"""Sampled targets on their way to the host, and back among rows that keep nothing.

Shapes: `N` rows, `K` of them sampled, `E` entries.
"""

from __future__ import annotations

import resource
import sys
from typing import Any

import numpy.typing as npt
import torch

from stillroom.kernels import targets as torch_targets
from stillroom.storage.targets import SparseTargets

FIELDS = ("offsets", "ids", "weights", "label_logp", "entropy", "logp")


def to_host(targets: torch_targets.SparseTargets) -> SparseTargets:
    """The storage twin of sampled targets.

    From a GPU they come through pinned memory on the current stream, all fields behind one wait.
    """
    found = {name: tensor for name in FIELDS if (tensor := getattr(targets, name)) is not None}
    if not targets.offsets.is_cuda:
        return SparseTargets(**{name: tensor.numpy() for name, tensor in found.items()})
    pinned = {name: torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for name, x in found.items()}
    for name, tensor in found.items():
        pinned[name].copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(targets.offsets.device).synchronize()
    # Copied once more: pinned memory is scarce, and these wait until their shard is full.
    arrays: dict[str, npt.NDArray[Any]] = {name: tensor.numpy().copy() for name, tensor in pinned.items()}
    return SparseTargets(**arrays)


def spread(targets: torch_targets.SparseTargets, kept_K: torch.Tensor, rows: int) -> torch_targets.SparseTargets:
    """`K` sampled rows at their places among `rows`; the others are empty, label log-probability and entropy NaN: not known.

    Args:
        targets: of the sampled rows.
        kept_K: int64 places, ascending.
        rows: N.
    """
    counts_N = targets.offsets.new_zeros(rows).index_copy_(0, kept_K, targets.offsets.diff())
    offsets = targets.offsets.new_zeros(rows + 1)
    offsets[1:] = counts_N.cumsum(0)
    label_logp_N, entropy_N = (
        x.new_full((rows,), torch.nan).index_copy_(0, kept_K, x) for x in (targets.label_logp, targets.entropy)
    )
    return torch_targets.SparseTargets(offsets, targets.ids, targets.weights, label_logp_N, entropy_N, targets.logp)


def peak_bytes() -> tuple[int, int | None]:
    """Most memory this process held so far: of the host, and of its CUDA devices together (None without)."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if not torch.cuda.is_available():
        return host, None
    return host, sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
