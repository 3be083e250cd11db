"""The student's softmax of a block of rows, with the tail summed directly where it is wanted.

Shapes: `R` rows, `V` vocabulary, `P` punched places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Student:
    """The student's log-probabilities of a block: log q = (z - top) - log_total.

    `log_tail_R` is the log of the probability of what was not punched out: 0 where nothing was.
    """

    top_R: Tensor
    log_total_R: Tensor
    log_tail_R: Tensor

    def logq(self, logit: Tensor, row: Tensor) -> Tensor:
        """Log-probability of logits of the given rows."""
        return (logit - self.top_R[row]) - self.log_total_R[row]


def softmax_into(buffer_RV: Tensor, logits_RV: Tensor, punched: tuple[Tensor, Tensor] | None) -> Student:
    """Softmax of the rows into the buffer; its largest value is 1 / sum of exp(z - top): the normaliser without another pass.

    Args:
        buffer_RV: overwritten, in the dtype of the computation.
        logits_RV: any floating dtype.
        punched: (row, id), `[P]` each, places to leave out: the buffer is then the softmax over the others, 0 at these, so
            that the others' probability, `log_tail_R`, is a sum and not what is left of 1. Each place once.
    """
    if punched is None:
        torch.softmax(logits_RV, 1, dtype=buffer_RV.dtype, out=buffer_RV)
        top_R = logits_RV.amax(1).to(buffer_RV.dtype)
        return Student(top_R, -buffer_RV.amax(1).log(), torch.zeros_like(top_R))
    row_P, id_P = punched
    holes_RV = logits_RV.to(buffer_RV.dtype, copy=True)
    holes_RV[row_P, id_P] = -torch.inf
    tail_top_R = holes_RV.amax(1)
    torch.softmax(holes_RV, 1, out=buffer_RV)
    empty_R = tail_top_R == -torch.inf
    buffer_RV.masked_fill_(empty_R.unsqueeze(1), 0.0)  # softmax of nothing is NaN
    tail_sum_R = torch.where(empty_R, 0.0, buffer_RV.amax(1).reciprocal())
    logit_P = logits_RV[row_P, id_P].to(buffer_RV.dtype)
    top_R = tail_top_R.scatter_reduce(0, row_P, logit_P, "amax")
    kept_P = (logit_P - top_R[row_P]).exp().double()
    kept_R = torch.zeros_like(top_R, dtype=torch.float64).index_add_(0, row_P, kept_P)
    tail_R = torch.where(empty_R, 0.0, tail_sum_R.double() * (tail_top_R - top_R).double().exp())
    log_total_R = (tail_R + kept_R).log()
    log_tail_R = torch.where(
        empty_R, -torch.inf, (tail_top_R - top_R).double() + tail_sum_R.double().log() - log_total_R
    )
    return Student(top_R, log_total_R.to(buffer_RV.dtype), log_tail_R.to(buffer_RV.dtype))
