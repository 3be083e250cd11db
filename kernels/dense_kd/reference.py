"""Divergence to a live teacher's whole distribution, mixed with cross-entropy. Plain PyTorch on any device.

Values and gradients are those of `sparse_kd` with every id kept at its exact probability; the table of divergences is the same.

Shapes: `N` rows, `V` vocabulary of both logits, `C` rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from stillroom.kernels.sparse_kd.divergence import DIVERGENCES
from stillroom.kernels.sparse_kd.loss import SparseKDOutput
from stillroom.kernels.sparse_kd.problem import IGNORE_LABEL, TargetSplit

CHUNK_BYTES: Final = 1 << 26  # of one float32 buffer; three live at a time for forward KL, six for the others
LOWEST_LOGP: Final = -1e4  # an id the teacher masks with -inf: p is 0 all the same, and 0 * log p stays 0


@dataclass(frozen=True, slots=True)
class _Settings:
    alpha: float
    divergence: str
    parameter: float
    temperature: float
    split: TargetSplit | None


def dense_kd_loss(
    logits_NV: Tensor,
    teacher_NV: Tensor,
    labels_N: Tensor,
    *,
    alpha: float = 0.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    temperature: float = 1.0,
    row_weights_N: Tensor | None = None,
    split: TargetSplit | None = None,
) -> SparseKDOutput:
    """`sum_n w_n [(1 - alpha) T**2 D(p_n, q_n) + alpha CE_n]`, p teacher, q student, softmax in float32.

    The gradient is made in the forward pass, chunk by chunk, by the closed form of `sparse_kd.divergence` with w = p.

    Args:
        logits_NV: the student's logits, all of the teacher's vocabulary and no more.
        teacher_NV: the teacher's logits at T = 1, any floating dtype.
        labels_N: int64 labels, -100 where the row is ignored.
        alpha: share of hard-label cross-entropy.
        divergence: key of `DIVERGENCES`.
        beta: the teacher's share of the mixture of `jsd`.
        skew: parameter of the skew divergences.
        temperature: T of both distributions in the divergence; cross-entropy is at T = 1.
        row_weights_N: weight of each row; without it every row with a label weighs one over their number.
        split: factors of the label's part and of the rest of the forward KL, see `TargetSplit`; T = 1 only.

    Returns:
        The loss (nats) and its two parts per row, detached, zero in ignored rows.

    Raises:
        ValueError: logits of different shapes, or a split of anything but the forward KL at T = 1.
    """
    if logits_NV.shape != teacher_NV.shape:
        raise ValueError(
            f"`teacher_NV` came as {list(teacher_NV.shape)} beside student logits {list(logits_NV.shape)}, wanted the same "
            "shape: cut both to the ids they share"
        )
    if split is not None and (divergence != "forward_kl" or temperature != 1.0):
        raise ValueError(
            f"`split` came with divergence={divergence!r} and temperature={temperature}, wanted forward_kl at temperature 1"
        )
    valid_N = labels_N != IGNORE_LABEL
    if row_weights_N is None:
        row_weights_N = torch.full_like(labels_N, 1, dtype=torch.float32) / valid_N.sum().clamp(min=1)
    parameter = {"beta": beta, "skew": skew, None: 0.0}[DIVERGENCES[divergence].parameter]
    settings = _Settings(alpha, divergence, parameter, temperature, split)
    loss, kd_N, ce_N = _DenseKD.apply(  # type: ignore[no-untyped-call]
        logits_NV, teacher_NV, labels_N.clamp(min=0), row_weights_N * valid_N, valid_N, settings
    )
    return SparseKDOutput(loss, kd_N, ce_N)


class _DenseKD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        teacher_NV: Tensor,
        labels_N: Tensor,
        weights_N: Tensor,
        valid_N: Tensor,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, vocabulary = logits_NV.shape
        grad_NV = torch.empty_like(logits_NV) if ctx.needs_input_grad[0] else None
        kd_N = torch.zeros(rows, device=logits_NV.device)
        ce_N = torch.zeros_like(kd_N)
        alpha, chunk = settings.alpha, max(1, CHUNK_BYTES // (4 * vocabulary))
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            label_C1 = labels_N[part, None]
            logq_CV = torch.log_softmax(logits_NV[part], dim=-1, dtype=torch.float32)
            ce_N[part] = -logq_CV.gather(-1, label_C1)[:, 0]
            kd_N[part], pull_CV = _divergence(
                logq_CV, logits_NV[part], teacher_NV[part], label_C1, part, settings, grad_NV is not None
            )
            if grad_NV is not None:
                grad_CV = pull_CV.mul_((1.0 - alpha) * settings.temperature)
                if alpha:
                    grad_CV.add_(logq_CV.exp_(), alpha=alpha)
                    grad_CV.scatter_add_(-1, label_C1, torch.full_like(grad_CV[:, :1], -alpha))
                grad_NV[part] = grad_CV.mul_(weights_N[part, None])
        kd_N *= valid_N
        ce_N *= valid_N
        ctx.save_for_backward(*([] if grad_NV is None else [grad_NV]))
        ctx.mark_non_differentiable(kd_N, ce_N)
        return (weights_N * ((1.0 - alpha) * kd_N + alpha * ce_N)).sum(), kd_N, ce_N

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NV,) = ctx.saved_tensors
        return grad_NV.mul_(grad_loss), None, None, None, None, None


def _divergence(
    logq_CV: Tensor,
    logits_CV: Tensor,
    teacher_CV: Tensor,
    label_C1: Tensor,
    part: slice,
    settings: _Settings,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Divergence of each row, T**2 included, and its gradient by z / T, up to the factor T."""
    temperature = settings.temperature
    if temperature != 1.0:
        logq_CV = torch.log_softmax(logits_CV.float() / temperature, dim=-1)
        teacher_CV = teacher_CV.float() / temperature
    logp_CV = torch.log_softmax(teacher_CV, dim=-1, dtype=torch.float32).clamp_(min=LOWEST_LOGP)
    if settings.split is not None:
        tkd_C1, dkd_C1 = (x[part, None].float() for x in (settings.split.tkd_N, settings.split.dkd_N))
        return _split(logq_CV, logp_CV, label_C1, tkd_C1, dkd_C1)
    p_CV = logp_CV.exp()
    if settings.divergence == "forward_kl":
        kd_C = torch.linalg.vecdot(p_CV, logp_CV.sub_(logq_CV))
        return kd_C * temperature**2, logq_CV.exp().sub_(p_CV) if gradient else p_CV
    divergence, parameter = DIVERGENCES[settings.divergence], settings.parameter
    kd_C = divergence.term(p_CV, logp_CV, logq_CV, parameter).sum(-1) + divergence.constant(parameter)
    pull_CV = p_CV
    if gradient:
        pull_CV = divergence.pull(p_CV, logp_CV, logq_CV, parameter)
        pull_CV = pull_CV.sub_(logq_CV.exp().mul_(pull_CV.sum(-1, keepdim=True)))
    return kd_C * temperature**2, pull_CV


def _split(logq_CV: Tensor, logp_CV: Tensor, label_C1: Tensor, tkd_C1: Tensor, dkd_C1: Tensor) -> tuple[Tensor, Tensor]:
    """tkd * TKD + dkd * DKD and its gradient; what is left beside the label is summed, not taken from 1."""
    at_label = torch.zeros_like(logq_CV, dtype=torch.bool).scatter_(-1, label_C1, True)
    label_logq_C1, label_logp_C1 = logq_CV.gather(-1, label_C1), logp_CV.gather(-1, label_C1)
    rest_q_CV, rest_p_CV = (x.masked_fill(at_label, -torch.inf) for x in (logq_CV, logp_CV))
    log_u_C1, log_unc_C1 = (x.logsumexp(-1, keepdim=True).clamp(min=LOWEST_LOGP) for x in (rest_q_CV, rest_p_CV))
    p_C1, unc_C1 = label_logp_C1.exp(), log_unc_C1.exp()
    tkd_C = (p_C1 * (label_logp_C1 - label_logq_C1) + unc_C1 * (log_unc_C1 - log_u_C1))[:, 0]
    rest_q_CV, rest_p_CV = rest_q_CV - log_u_C1, rest_p_CV - log_unc_C1
    share_p_CV, share_q_CV = rest_p_CV.exp(), rest_q_CV.exp()
    gap_CV = torch.where(share_p_CV > 0, share_p_CV * (rest_p_CV - rest_q_CV), 0.0)
    kd_C = tkd_C1[:, 0] * tkd_C + dkd_C1[:, 0] * gap_CV.sum(-1)
    excess_C1 = tkd_C1 * torch.where(p_C1 < 0.5, label_logq_C1.exp() - p_C1, unc_C1 - log_u_C1.exp())
    # q_g - p_g at the label; the others share its opposite in proportion to q
    grad_CV = share_q_CV * (dkd_C1 - excess_C1) - dkd_C1 * share_p_CV
    return kd_C, grad_CV.scatter_(-1, label_C1, excess_C1)
