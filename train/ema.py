"""A running average of the trained weights: s <- d s + (1 - d) w after every step, d = min(decay, (1 + k) / (10 + k)) at step k.

The smaller d of the first steps lets the average forget the weights it began with (as TensorFlow's ExponentialMovingAverage does
with `num_updates`). It lives where the weights live, cut as they are cut.
"""

from __future__ import annotations

from typing import final

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@final
class Ema:
    """The average of a model's trained parameters.

    Args:
        model: placed and cut.
        decay: d, in [0, 1).

    Attributes:
        average: parameter's name to average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in trained.items()}
        self._weights = list(trained.values())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step`, counted from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        here = [_local(x) for x in self.average.values()]
        torch._foreach_lerp_(here, [_local(x) for x in self._weights], 1.0 - decay)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
