"""Factors of rows in the loss, from what the cache keeps of them or from a file. Their mean over the data is one.

Shapes: `B` sequences, `L` positions, `N` = B * L rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from stillroom.train.batch import Batch


@dataclass(frozen=True, slots=True)
class RowWeights:
    """`factor_n = value_n**power / mean`, times `hard_weight / hard_mean` on hard rows and `1 / hard_mean` on the others.

    Attributes:
        value: `entropy` (the teacher's, nats), `surprise` (minus its log-probability of the label), `column` (of a file), or
            None: 1.
        power: exponent.
        mean: mean of value**power over all rows of the data, so that a step's loss keeps its size.
        hard_upto: rows whose label the teacher gives at most this log-probability are hard.
        hard_weight: factor of hard rows against the others.
        hard_mean: mean of that factor over all rows.
    """

    value: Literal["entropy", "surprise", "column"] | None = None
    power: float = 1.0
    mean: float = 1.0
    hard_upto: float | None = None
    hard_weight: float = 1.0
    hard_mean: float = 1.0

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Factors of the batch's rows, `[N]` float32, 0 outside the mask."""
        factor_N = torch.ones_like(batch.labels_BL.flatten(), dtype=torch.float32)
        if self.value == "column":
            assert batch.weight_BL is not None
            factor_N = batch.weight_BL.flatten().pow(self.power) / self.mean
        elif self.value is not None:
            assert batch.targets is not None
            value_N = batch.targets.entropy if self.value == "entropy" else -batch.targets.label_logp
            factor_N = value_N.clamp(min=0.0).pow(self.power) / self.mean
        if self.hard_upto is not None:
            assert batch.targets is not None
            hard_N = batch.targets.label_logp <= self.hard_upto
            factor_N = factor_N * torch.where(hard_N, self.hard_weight, 1.0) / self.hard_mean
        return torch.where(batch.mask_BL.flatten(), factor_N, 0.0)  # rows outside the mask have neither value
