"""Where the targets of a batch come from: the one seam between a teacher on disk and a teacher in memory.

A `TargetSource` is asked for the targets of a batch and the training step cannot tell which one answers. Caches, one or
several mixed (`mixing.py`), are read with the batch, in the loader's workers; a live teacher is asked when the step needs it.

Shapes: `B` sequences, `L` positions, `N` = B * L rows, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from stillroom.kernels.targets import SparseTargets
from stillroom.train.batch import Batch


@dataclass(frozen=True, slots=True)
class DenseTargets:
    """A live teacher's whole distribution.

    Attributes:
        logits_NV: `[N, V]`, T = 1.
    """

    logits_NV: torch.Tensor

    def label_logp(self, labels_N: torch.Tensor) -> torch.Tensor:
        """Log-probability of each label, nats, `[N]` float32; anything where the label is -100."""
        logits_N = self.logits_NV.gather(1, labels_N.clamp(min=0)[:, None])[:, 0].float()
        return logits_N - log_partition(self.logits_NV)


Targets = SparseTargets | DenseTargets


class TargetSource(Protocol):
    """Who answers what the teacher thinks of a batch's rows."""

    def __call__(self, batch: Batch) -> Targets:
        """Targets of the batch's `N` rows, on its device."""


@dataclass(frozen=True, slots=True)
class Cached:
    """Targets that came with the batch, from one cache or several."""

    def __call__(self, batch: Batch) -> SparseTargets:
        """See `TargetSource`."""
        assert batch.targets is not None
        return batch.targets


@dataclass(frozen=True, slots=True)
class LiveTeacher:
    """A frozen model in this process.

    Attributes:
        model: a causal language model in evaluation mode.
        vocab_size: columns of its logits to return.
        dtype: precision of its matrix products.
    """

    model: nn.Module
    vocab_size: int
    dtype: torch.dtype = torch.float32

    def __call__(self, batch: Batch) -> DenseTargets:
        """See `TargetSource`."""
        return DenseTargets(self.logits(batch))

    @torch.no_grad()
    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits `[N, V]` of a batch, its documents read apart where it has any."""
        with torch.autocast(batch.tokens_BL.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            logits_BLV: torch.Tensor = self.model(**batch.inputs, use_cache=False).logits
        return logits_BLV.flatten(0, 1)[:, : self.vocab_size]


@torch.no_grad()
def log_partition(logits_NV: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp of every row, `[N]` float32, a few rows at a time: no second buffer of the logits' size."""
    step = max(1, (1 << 22) // logits_NV.shape[1])
    parts = [part_RV.float().logsumexp(1) for part_RV in torch.split(logits_NV, step)]
    return torch.cat(parts) if parts else logits_NV.new_zeros(0, dtype=torch.float32)
