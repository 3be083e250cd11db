"""KL to a live teacher's whole distribution, mixed with cross-entropy: the reference every sparse target is measured against.

Shapes: `N` rows, `V` vocabulary of the student's logits (the teacher's may be narrower), `C` rows of a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional

CHUNK_BYTES = 1 << 26  # of one float32 buffer; three live at a time
LOWEST_LOGP = -1e4  # a token the teacher masks with -inf: p is 0 all the same, and 0 * log p stays 0


class DenseKDOutput(NamedTuple):
    """What `dense_kd_loss` returns; `kd_N` and `ce_N` are detached and zero in ignored rows."""

    loss: torch.Tensor
    kd_N: torch.Tensor
    ce_N: torch.Tensor


def dense_kd_loss(
    logits_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    alpha: float = 0.0,
    row_weights_N: torch.Tensor | None = None,
) -> DenseKDOutput:
    """`sum_n w_n [(1 - alpha) KL(p_n || q_n) + alpha CE_n]`, p teacher, q student, softmax in float32, T = 1.

    The gradient `w_n (q - (1 - alpha) p - alpha onehot)` is made in the forward pass, chunk by chunk.

    Args:
        logits_NV: the student's logits, all of the teacher's vocabulary and no more.
        teacher_NV: the teacher's logits, any floating dtype.
        labels_N: int64 labels, -100 where the row is ignored.
        alpha: share of hard-label cross-entropy.
        row_weights_N: weight of each row; without it every row with a label weighs one over their number.

    Returns:
        The loss (nats) and its two parts per row.
    """
    valid_N = labels_N != -100
    if row_weights_N is None:
        row_weights_N = torch.full_like(labels_N, 1, dtype=torch.float32) / valid_N.sum().clamp(min=1)
    weights_N = row_weights_N * valid_N
    loss, kd_N, ce_N = _DenseKD.apply(logits_NV, teacher_NV, labels_N.clamp(min=0), weights_N, valid_N, alpha)  # type: ignore[no-untyped-call]
    return DenseKDOutput(loss, kd_N, ce_N)


class _DenseKD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: torch.Tensor,
        teacher_NV: torch.Tensor,
        labels_N: torch.Tensor,
        weights_N: torch.Tensor,
        valid_N: torch.Tensor,
        alpha: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows, vocab = logits_NV.shape
        grad_NV = torch.empty_like(logits_NV) if ctx.needs_input_grad[0] else None
        kd_N = torch.zeros(rows, device=logits_NV.device)
        ce_N = torch.zeros_like(kd_N)
        chunk = max(1, CHUNK_BYTES // (4 * vocab))
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            logq_CV = functional.log_softmax(logits_NV[part], dim=-1, dtype=torch.float32)
            logp_CV = functional.log_softmax(teacher_NV[part], dim=-1, dtype=torch.float32)
            p_CV = logp_CV.clamp_(min=LOWEST_LOGP).exp()
            kd_N[part] = torch.linalg.vecdot(p_CV, logp_CV.sub_(logq_CV))
            ce_N[part] = -logq_CV.gather(-1, labels_N[part, None])[:, 0]
            if grad_NV is not None:
                del logp_CV
                delta_CV = logq_CV.exp_().sub_(p_CV, alpha=1.0 - alpha)
                delta_CV.scatter_add_(-1, labels_N[part, None], torch.full_like(delta_CV[:, :1], -alpha))
                grad_NV[part] = delta_CV.mul_(weights_N[part, None])
        kd_N *= valid_N
        ce_N *= valid_N
        ctx.save_for_backward(*([] if grad_NV is None else [grad_NV]))
        ctx.mark_non_differentiable(kd_N, ce_N)
        return (weights_N * ((1.0 - alpha) * kd_N + alpha * ce_N)).sum(), kd_N, ce_N

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_NV,) = ctx.saved_tensors
        return grad_NV.mul_(grad_loss), None, None, None, None, None
