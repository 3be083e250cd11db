"""Loss and gradient of one block of rows, closed form.

Shapes: `R` rows of the block, `V` vocabulary, `E` their entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.kernels.sparse_kd.divergence import Divergence


@dataclass(frozen=True, slots=True)
class Block:
    """A block of rows: logits, entries, labels and what the loss makes of them.

    Attributes:
        logits_RV: student logits.
        row_E: row of each entry within the block.
        id_E: int64 token ids.
        weight_E: target weights, in the dtype of the computation.
        label_R: labels; negative is ignored, its `*_scale_R` are 0.
        kd_scale_R: factor of the row's divergence in the loss.
        ce_scale_R: factor of the row's cross-entropy.
    """

    logits_RV: Tensor
    row_E: Tensor
    id_E: Tensor
    weight_E: Tensor
    label_R: Tensor
    kd_scale_R: Tensor
    ce_scale_R: Tensor

    def sum_rows(self, value_E: Tensor) -> Tensor:
        """Sum of the entries of each row, `[R]`; added up in float64, one after the other in float32 loses digits."""
        sum_R = value_E.new_zeros(len(self.label_R), dtype=torch.float64)
        return sum_R.index_add_(0, self.row_E, value_E.double()).to(value_E.dtype)

    def max_rows(self, value_E: Tensor) -> Tensor:
        """Largest entry of each row, -inf for a row without entries, `[R]`."""
        return value_E.new_full((len(self.label_R),), -torch.inf).scatter_reduce_(0, self.row_E, value_E, "amax")


@dataclass(frozen=True, slots=True)
class _Student:
    """The student's log-probabilities of a block: log q = (z - top) - log_total, and the part the buffer holds.

    The buffer is the softmax over all ids, or over the tail alone where the kept ids are punched out; `log_tail_R` is
    then the log of the tail's probability.
    """

    top_R: Tensor
    log_total_R: Tensor
    log_tail_R: Tensor | None

    def logq(self, logit: Tensor, row: Tensor) -> Tensor:
        return (logit - self.top_R[row]) - self.log_total_R[row]


def block_loss(
    block: Block, buffer_RV: Tensor, missing: str, divergence: Divergence, gradient: bool
) -> tuple[Tensor, Tensor]:
    """KD and CE of each row, `[R]` each; with `gradient` the buffer then holds the gradient of the scaled sum.

    Args:
        block: the rows.
        buffer_RV: working space in the dtype of the computation, overwritten.
        missing: convention for the mass a target lacks, see `sparse_kd_loss`.
        divergence: between target and student.
        gradient: whether the buffer is to hold the gradient.
    """
    row_E, id_E = block.row_E, block.id_E
    logit_E = block.logits_RV[row_E, id_E].to(buffer_RV.dtype)
    student = _softmax(block, buffer_RV, logit_E, punch=missing == "tail_bucket")
    every_R = torch.arange(len(block.label_R), device=row_E.device)
    label_R = block.label_R.clamp_min(0)
    ce_R = -student.logq(block.logits_RV[every_R, label_R].to(buffer_RV.dtype), every_R)

    mass_R = block.sum_rows(block.weight_E)
    weight_E = block.weight_E
    if missing.startswith("renormalise"):
        weight_E = torch.where(weight_E > 0, weight_E / mass_R[row_E], 0.0)
    logq_E = student.logq(logit_E, row_E)
    if missing == "renormalise_both":
        top_R = block.max_rows(logit_E)
        over_E = logit_E - top_R[row_E]
        logq_E = over_E - block.sum_rows(over_E.exp()).log()[row_E]
    kd_R = block.sum_rows(divergence.term(weight_E, logq_E))
    pull_E = divergence.pull(weight_E, logq_E)
    pulled_R = block.sum_rows(pull_E)
    rest_pull_R = None
    if student.log_tail_R is not None:
        rest_R = torch.where((mass_R > 0) & student.log_tail_R.isfinite(), (1.0 - mass_R).clamp_min(0.0), 0.0)
        kd_R += divergence.term(rest_R, student.log_tail_R)
        rest_pull_R = divergence.pull(rest_R, student.log_tail_R)
        pulled_R += rest_pull_R

    if gradient:
        # d/dz_j = kd_scale * (pull_j - pulled * q_j) + ce_scale * (q_j - [j is the label])
        if missing == "renormalise_both":  # q over the kept ids only
            scale_R = block.ce_scale_R
            fix_E = block.kd_scale_R[row_E] * (pull_E - pulled_R[row_E] * logq_E.exp())
        else:
            scale_R = block.ce_scale_R - block.kd_scale_R * pulled_R
            fix_E = block.kd_scale_R[row_E] * pull_E
        if student.log_tail_R is not None and rest_pull_R is not None:
            # kept ids are 0 in the buffer; the bucket's pull spreads over the tail as the student does
            fix_E += scale_R[row_E] * logq_E.exp()
            scale_R = scale_R * student.log_tail_R.exp() + block.kd_scale_R * rest_pull_R
        buffer_RV.mul_(scale_R.unsqueeze(1))
        buffer_RV.index_put_((row_E, id_E), fix_E, accumulate=True)
        buffer_RV.index_put_((every_R, label_R), -block.ce_scale_R, accumulate=True)
    return kd_R, ce_R


def _softmax(block: Block, buffer_RV: Tensor, logit_E: Tensor, *, punch: bool) -> _Student:
    """Softmax into the buffer. Its largest value is 1 / sum of exp(z - top): the normaliser without another pass."""
    if not punch:
        torch.softmax(block.logits_RV, 1, dtype=buffer_RV.dtype, out=buffer_RV)
        top_R = block.logits_RV.amax(1).to(buffer_RV.dtype)
        return _Student(top_R, -buffer_RV.amax(1).log(), None)
    punched_RV = block.logits_RV.to(buffer_RV.dtype, copy=True)
    punched_RV[block.row_E, block.id_E] = -torch.inf
    tail_top_R = punched_RV.amax(1)
    torch.softmax(punched_RV, 1, out=buffer_RV)
    empty_R = tail_top_R == -torch.inf
    buffer_RV.masked_fill_(empty_R.unsqueeze(1), 0.0)  # softmax of nothing is NaN
    top_R = torch.maximum(tail_top_R, block.max_rows(logit_E))
    kept_R = block.sum_rows((logit_E - top_R[block.row_E]).exp())
    log_tail_R = torch.where(empty_R, -torch.inf, tail_top_R - top_R - buffer_RV.amax(1).log())
    log_total_R = (log_tail_R.exp() + kept_R).log()
    return _Student(top_R, log_total_R, log_tail_R - log_total_R)
