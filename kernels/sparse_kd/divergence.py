"""Divergences between a sparse target and the student, each a row of one table.

A target keeps weights w_k, estimates of the teacher's p_k, and the student's log q_k is exact. A divergence of the form
sum_k term(w_k, log q_k) has the gradient, in the student's logits z,

    dD/dz_j = w_j g_j - (sum_k w_k g_k) q_j        with w_k g_k = d term / d log q_k

so one number per kept entry and one per row decide everything; the rest of the vocabulary is the softmax times a row scalar.

Shapes: `E` entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Divergence:
    """One divergence, as functions of (weights, student log-probabilities).

    Attributes:
        term: contribution of each entry to the value.
        pull: w*g of each entry, the derivative of its term by the student's log-probability.
    """

    term: Callable[[Tensor, Tensor], Tensor]
    pull: Callable[[Tensor, Tensor], Tensor]


def _forward_kl_term(weight_E: Tensor, logq_E: Tensor) -> Tensor:
    return torch.where(weight_E > 0, weight_E * (weight_E.log() - logq_E), 0.0)  # 0 log 0 = 0, also against q = 0


def _forward_kl_pull(weight_E: Tensor, logq_E: Tensor) -> Tensor:
    return -weight_E


DIVERGENCES: Final[Mapping[str, Divergence]] = MappingProxyType(
    {
        "forward_kl": Divergence(_forward_kl_term, _forward_kl_pull),
    }
)
