"""Loss and gradient of one block of rows, closed form.

Shapes: `R` rows of the block, `V` vocabulary, `E` their entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.kernels.sparse_kd.divergence import DIVERGENCES
from stillroom.kernels.sparse_kd.problem import LEAST_MISSING, Problem
from stillroom.kernels.sparse_kd.student import Student, softmax_into


@dataclass(frozen=True, slots=True)
class Block:
    """A block of rows: logits, entries, labels and what the loss makes of them.

    Attributes:
        logits_RV: student logits.
        row_E: row of each entry within the block.
        id_E: int64 token ids.
        weight_E: target weights, in the dtype of the computation, as all that follow.
        logp_E: teacher's log-probabilities; anything where the divergence does not need them.
        label_R: labels; negative is ignored, its `*_scale_R` are 0.
        kd_scale_R: factor of the row's divergence in the loss.
        ce_scale_R: factor of the row's cross-entropy.
        split: label's log-probability by the teacher, and the factors of TKD and DKD, `[R]` each; None without a split.
    """

    logits_RV: Tensor
    row_E: Tensor
    id_E: Tensor
    weight_E: Tensor
    logp_E: Tensor
    label_R: Tensor
    kd_scale_R: Tensor
    ce_scale_R: Tensor
    split: tuple[Tensor, Tensor, Tensor] | None = None

    def sum_rows(self, value_E: Tensor) -> Tensor:
        """Sum of the entries of each row, `[R]`; added up in float64, one after the other in float32 loses digits."""
        sum_R = value_E.new_zeros(len(self.label_R), dtype=torch.float64)
        return sum_R.index_add_(0, self.row_E, value_E.double()).to(value_E.dtype)

    def max_rows(self, value_E: Tensor) -> Tensor:
        """Largest entry of each row, -inf for a row without entries, `[R]`."""
        return value_E.new_full((len(self.label_R),), -torch.inf).scatter_reduce_(0, self.row_E, value_E, "amax")


@dataclass(frozen=True, slots=True)
class _Head:
    """The divergence of a block and its gradient by z/T, up to the row's factor.

    The gradient is `along_R` times the student's q, plus `bucket_R` times the student's distribution within the tail,
    plus `fix_E` at the entries. Where the label is a bucket of its own, its gradient is `label_R` and nothing else.
    """

    kd_R: Tensor
    along_R: Tensor
    fix_E: Tensor
    bucket_R: Tensor | None = None
    label_R: Tensor | None = None


def block_loss(block: Block, buffer_RV: Tensor, problem: Problem, gradient: bool) -> tuple[Tensor, Tensor]:
    """KD (T**2 included) and CE of each row, `[R]` each; with `gradient` the buffer then holds that of the scaled sum.

    Args:
        block: the rows.
        buffer_RV: working space in the dtype of the computation, overwritten.
        problem: divergence, temperature and convention; its tensors are not used.
        gradient: whether the buffer is to hold the gradient.
    """
    compute, temperature = buffer_RV.dtype, problem.temperature
    plain = temperature == 1.0
    logits_RV = block.logits_RV if plain else block.logits_RV.to(compute) / temperature
    every_R = torch.arange(len(block.label_R), device=block.row_E.device)
    label_R = block.label_R.clamp_min(0)
    punched = None
    if block.split is not None:
        kept_R = torch.zeros_like(label_R).index_add_(0, block.row_E, (block.id_E == label_R[block.row_E]).long())
        absent_R = kept_R == 0
        punched = (torch.cat((block.row_E, every_R[absent_R])), torch.cat((block.id_E, label_R[absent_R])))
    elif problem.missing == "tail_bucket":
        punched = (block.row_E, block.id_E)
    student = softmax_into(buffer_RV, logits_RV, punched)
    logit_E = logits_RV[block.row_E, block.id_E].to(compute)
    logq_E = student.logq(logit_E, block.row_E)
    label_logq_R = student.logq(logits_RV[every_R, label_R].to(compute), every_R)
    if plain:
        ce_R = -label_logq_R
    else:
        z_RV = block.logits_RV.to(compute)
        ce_R = z_RV.logsumexp(1) - z_RV[every_R, label_R]
    if block.split is None:
        head = _divergence_head(block, problem, student, logit_E, logq_E)
    else:
        head = _split_head(block, problem, student, logq_E, label_logq_R)

    if gradient:
        # d/dz_j: T**2 of the value and 1/T of the logits make T; cross-entropy adds ce_scale * (q_j - [j is the label])
        kd_scale_R = block.kd_scale_R * temperature
        scale_R = kd_scale_R * head.along_R
        if plain:
            scale_R = scale_R + block.ce_scale_R
        fix_E = kd_scale_R[block.row_E] * head.fix_E
        fix_label_R = -block.ce_scale_R
        if punched is not None:  # those are 0 in the buffer, which is the distribution within the tail
            fix_E += scale_R[block.row_E] * logq_E.exp()
            if head.label_R is not None:
                is_label_E = block.id_E == label_R[block.row_E]
                fix_E = torch.where(is_label_E, 0.0, fix_E)
                fix_label_R = fix_label_R + kd_scale_R * head.label_R
                if plain:
                    fix_label_R = fix_label_R + block.ce_scale_R * label_logq_R.exp()
            scale_R = scale_R * student.log_tail_R.exp()
            if head.bucket_R is not None:
                scale_R = scale_R + kd_scale_R * head.bucket_R
        buffer_RV.mul_(scale_R.unsqueeze(1))
        if not plain and problem.alpha > 0:
            buffer_RV.addcmul_(torch.softmax(z_RV, 1), block.ce_scale_R.unsqueeze(1))
        buffer_RV.index_put_((block.row_E, block.id_E), fix_E, accumulate=True)
        buffer_RV.index_put_((every_R, label_R), fix_label_R, accumulate=True)
    return head.kd_R * (temperature * temperature), ce_R


def _divergence_head(block: Block, problem: Problem, student: Student, logit_E: Tensor, logq_E: Tensor) -> _Head:
    divergence, parameter, missing = DIVERGENCES[problem.divergence], problem.parameter, problem.missing
    row_E, weight_E, logp_E = block.row_E, block.weight_E, block.logp_E
    mass_R = block.sum_rows(weight_E)
    if missing.startswith("renormalise"):  # p with the weights: for top-k they are the same number
        weight_E = torch.where(weight_E > 0, weight_E / mass_R[row_E], 0.0)
        logp_E = logp_E - mass_R.log()[row_E]
    if missing == "renormalise_both":
        over_E = logit_E - block.max_rows(logit_E)[row_E]
        logq_E = over_E - block.sum_rows(over_E.exp()).log()[row_E]
    # The constant and the terms nearly cancel where student and teacher agree: they meet before anything is rounded.
    kd_R = block.sum_rows(divergence.term(weight_E, logp_E, logq_E, parameter).double())
    kd_R = kd_R + divergence.constant(parameter) * (mass_R > 0)
    pull_E = divergence.pull(weight_E, logp_E, logq_E, parameter)
    pulled_R = block.sum_rows(pull_E)
    if missing == "renormalise_both":  # q over the kept ids only
        return _Head(kd_R.to(mass_R), torch.zeros_like(mass_R), pull_E - pulled_R[row_E] * logq_E.exp())
    if missing != "tail_bucket":
        return _Head(kd_R.to(mass_R), -pulled_R, pull_E)
    log_tail_R = student.log_tail_R
    missing_R = 1.0 - mass_R
    there_R = (mass_R > 0) & log_tail_R.isfinite() & (missing_R > LEAST_MISSING)
    rest_R = torch.where(there_R, missing_R, 0.0)
    bucket = (rest_R, rest_R.log(), log_tail_R, parameter)
    rest_pull_R = divergence.pull(*bucket)
    kd_R = (kd_R + divergence.term(*bucket).double()).to(mass_R)
    return _Head(kd_R, -(pulled_R + rest_pull_R), pull_E, rest_pull_R)


def _split_head(block: Block, problem: Problem, student: Student, logq_E: Tensor, label_logq_R: Tensor) -> _Head:
    """tkd * TKD + dkd * DKD. With u = 1 - q_g: by z_j it is tkd * (q_j - (1 - p_g) q_j / u) + dkd * (s q_j / u - w_j)."""
    assert block.split is not None
    label_logp_R, tkd_R, dkd_R = block.split
    row_E = block.row_E
    live_R = block.sum_rows(block.weight_E) > 0
    others_E = block.id_E != block.label_R[row_E]
    weight_E = torch.where(others_E, block.weight_E, 0.0)
    p_R, unc_R = label_logp_R.exp(), -torch.expm1(label_logp_R)  # p_g and 1 - p_g, which is ATKD's uncertainty
    mass_R = block.sum_rows(weight_E) if problem.missing == "renormalise_teacher" else unc_R
    weight_E = torch.where(weight_E > 0, weight_E / mass_R[row_E], 0.0)
    usable_R = live_R & (mass_R > 0)
    weight_E = torch.where(usable_R[row_E], weight_E, 0.0)
    tail_R = student.log_tail_R.exp()
    u_R = tail_R + block.sum_rows(torch.where(others_E, logq_E.exp(), 0.0))
    log_u_R = u_R.log()
    forward_kl = DIVERGENCES["forward_kl"]

    def term(w: Tensor, logq: Tensor) -> Tensor:
        return forward_kl.term(w, logq, logq, 0.0)

    tkd_value_R = torch.where(live_R, term(p_R, label_logq_R) + term(unc_R, log_u_R), 0.0)
    dkd_value_R = block.sum_rows(term(weight_E, logq_E - log_u_R[row_E]))
    sum_R = block.sum_rows(weight_E)
    bucket_R = None
    if problem.missing == "tail_bucket":
        missing_R = 1.0 - sum_R
        rest_R = torch.where(usable_R & (tail_R > 0) & (missing_R > LEAST_MISSING), missing_R, 0.0)
        dkd_value_R = dkd_value_R + term(rest_R, student.log_tail_R - log_u_R)
        sum_R = sum_R + rest_R
        bucket_R = -dkd_R * rest_R
    # q_g - p_g, as whichever difference is between the smaller numbers
    excess_R = torch.where(p_R < 0.5, label_logq_R.exp() - p_R, unc_R - u_R)
    excess_R = torch.where(live_R, tkd_R * excess_R, 0.0)
    along_R = torch.where(u_R > 0, (dkd_R * sum_R - excess_R) / u_R, 0.0)
    kd_R = tkd_R * tkd_value_R + dkd_R * dkd_value_R
    return _Head(kd_R, along_R, -dkd_R[row_E] * weight_E, bucket_R, excess_R)
