"""`sparse_kd_loss`: the public function, and `loss_and_gradient` beneath it for kernels that make the logits themselves.

Shapes: `N` rows, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillroom.kernels.backend import resolve
from stillroom.kernels.sparse_kd import ops, reference
from stillroom.kernels.sparse_kd.problem import MISSING_MASS, Problem, TargetSplit, make_problem
from stillroom.kernels.targets import SparseTargets

__all__ = [
    "MISSING_MASS",
    "Problem",
    "Rows",
    "SparseKDOutput",
    "TargetSplit",
    "loss_and_gradient",
    "make_problem",
    "sparse_kd_loss",
]


@dataclass(frozen=True, slots=True)
class SparseKDOutput:
    """What `sparse_kd_loss` returns.

    Attributes:
        loss: scalar, or `[N]` with reduction="none"; float32 (float64 for float64 logits), carries the gradient.
        kd_N: `[N]`, divergence of every row (T**2 included), nats, detached; 0 for an ignored row or one without targets.
        ce_N: `[N]`, cross-entropy with the label, nats, detached; 0 for an ignored row.
    """

    loss: Tensor
    kd_N: Tensor
    ce_N: Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Values of the rows of a `Problem`.

    Attributes:
        kd_N: `[N]`, divergence (T**2 included), nats; 0 for an ignored row or one without targets.
        ce_N: `[N]`, cross-entropy with the label, nats; 0 for an ignored row.
        loss_N: `[N]` float64, weight * ((1 - alpha) * KD + alpha * CE).
    """

    kd_N: Tensor
    ce_N: Tensor
    loss_N: Tensor


def sparse_kd_loss(
    logits_NV: Tensor,
    targets: SparseTargets | None,
    labels_N: Tensor,
    *,
    alpha: float = 0.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    temperature: float = 1.0,
    missing: str = "truncate",
    row_weights_N: Tensor | None = None,
    reduction: str = "sum",
    split: TargetSplit | None = None,
    inplace: bool = False,
    impl: str = "auto",
    check: bool | None = None,
) -> SparseKDOutput:
    """Divergence from sparse targets mixed with cross-entropy: sum of row_weight * ((1 - alpha) * KD + alpha * CE).

    KD of a row is a divergence between its sparse target, with weights w, and the student's q = softmax(logits / T), times
    T**2; a row without targets has KD = 0 and contributes its cross-entropy, at T = 1, alone. `docs/losses.md` has every
    formula, its source, and which cache carries which divergence unbiased. What happens to the mass 1 - sum(w) a
    target lacks is `missing`:

    - `truncate`: nothing; an id without an entry counts as one the teacher gives no mass. Exact for sampled targets, which
      sum to 1.
    - `renormalise_teacher`: w is divided by its sum.
    - `renormalise_both`: so is w, and q by the student's mass on the same ids. Student mass elsewhere costs nothing.
    - `tail_bucket`: one more entry, the teacher's missing mass against the student's mass outside the kept ids, which
      is summed directly, not as 1 - sum(q).

    Args:
        logits_NV: `[N, V]` float32, bfloat16, float16 or float64, any strides. The student's.
        targets: targets of the same rows, ids unique within a row, of temperature `temperature` (`targets.tempered` makes them
            from those of T = 1); None for cross-entropy alone (alpha 1).
        labels_N: `[N]` int64; -100 ignores the row: no loss, zero gradient.
        alpha: share of the hard-label cross-entropy, 0 to 1.
        divergence: `forward_kl`, `reverse_kl`, `jsd`, `skew_kl`, `skew_reverse_kl` or `tvd`. All but the first need
            `targets.logp`.
        beta: the teacher's share of the mixture of `jsd`, between 0 and 1.
        skew: share of the mixture that is not skewed, between 0 and 1, of the two skew divergences.
        temperature: T of the distillation term, student's side.
        missing: one of `MISSING_MASS`.
        row_weights_N: `[N]` floating point, constants; 0 ignores the row. Default: with reduction="sum", 1 / number of rows with
            a label (so the loss is a mean over them; 0 when there are none), else 1. A constant factor of the loss, such as
            one over the number of accumulation steps, is cheapest here: elsewhere it costs a pass over the gradient.
        reduction: `sum`, a scalar, or `none`, a loss for every row, each with its own upstream gradient.
        split: weigh the label and the rest of the forward KL apart, see `TargetSplit`; needs `targets.label_logp`.
        inplace: give up the logits: the gradient is written over them, which saves the `[N, V]` buffer. They
            must not be used afterwards, by the caller or by an earlier operation's backward (autograd raises if one
            saved them). Ignored when no gradient is wanted.
        impl: `auto`, `triton` or `reference`, see `stillroom.kernels.backend.resolve`.
        check: look at the values of ids, weights and log-probabilities, too; on a CUDA device the host then waits for it.
            Default: on a CPU only.

    Returns:
        Loss, and KD and CE by row.

    Raises:
        ValueError: an argument of the wrong shape, type, device or range.
    """
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if logits_NV.dim() != 2 or logits_NV.dtype not in floats or logits_NV.shape[1] < 1:
        raise ValueError(
            f"`logits_NV` came as {logits_NV.dtype}{list(logits_NV.shape)}, wanted floating point [N, V]: "
            "flatten the batch with `logits.flatten(0, 1)`"
        )
    if labels_N.numel() != logits_NV.shape[0]:
        raise ValueError(
            f"`labels_N` came with {labels_N.numel()} labels, wanted {logits_NV.shape[0]}: one for each row of `logits_NV`"
        )
    problem = make_problem(
        targets,
        labels_N,
        vocabulary=logits_NV.shape[1],
        dtype=logits_NV.dtype,
        device=logits_NV.device,
        alpha=alpha,
        divergence=divergence,
        beta=beta,
        skew=skew,
        temperature=temperature,
        missing=missing,
        row_weights_N=row_weights_N,
        reduction=reduction,
        split=split,
        check=check,
    )
    backend = resolve(impl, logits_NV)
    wanted = logits_NV.requires_grad and torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        kd_N, ce_N, loss_N = ops.values_and_gradient(logits_NV, problem, wanted, backend)
        loss_N = loss_N.sum() if reduction == "sum" else loss_N
        return SparseKDOutput(loss_N.to(kd_N.dtype), kd_N, ce_N)
    loss, kd_N, ce_N = _SparseKD.apply(logits_NV, problem, wanted, inplace, reduction, backend)  # type: ignore[no-untyped-call]
    return SparseKDOutput(loss, kd_N, ce_N)


def loss_and_gradient(logits_NV: Tensor, problem: Problem, grad_NV: Tensor | None, impl: str = "auto") -> Rows:
    """Values of every row; the gradient of the sum of `loss_N` goes to `grad_NV`.

    Args:
        logits_NV: `[N, V]`.
        problem: of the same `N` rows; a `Problem.part` will do.
        grad_NV: `[N, V]`, overwritten, in the logits' dtype; may be `logits_NV` itself. None: no gradient, and the
            logits are left alone.
        impl: `auto`, `triton` or `reference`.
    """
    if resolve(impl, logits_NV) == "triton":
        from stillroom.kernels.sparse_kd import triton

        kd_N, ce_N = triton.loss_and_gradient(logits_NV, problem, grad_NV)
    else:
        kd_N, ce_N = reference.loss_and_gradient(logits_NV, problem, grad_NV)
    row_N = torch.zeros_like(kd_N, dtype=torch.float64)
    for share, part_N in ((1.0 - problem.alpha, kd_N), (problem.alpha, ce_N)):
        if share:  # else a label or target the student excludes would make 0 * inf of it
            row_N += share * part_N.double()
    return Rows(kd_N, ce_N, problem.weight_N.double() * row_N)


class _SparseKD(torch.autograd.Function):
    """The gradient is ready when forward returns; backward scales it."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, problem: Problem, wanted: bool, inplace: bool, reduction: str, backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_NV = None
        if wanted:
            grad_NV = logits_NV if inplace else torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
        rows = loss_and_gradient(logits_NV, problem, grad_NV, backend)
        loss = (rows.loss_N.sum() if reduction == "sum" else rows.loss_N).to(rows.kd_N.dtype)
        if grad_NV is not None:
            ctx.save_for_backward(grad_NV)
        ctx.backend, ctx.spent = backend, False
        ctx.mark_non_differentiable(rows.kd_N, rows.ce_N)
        return loss, rows.kd_N, rows.ce_N

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        if torch.is_grad_enabled():  # create_graph=True: the gradient would silently pass for a constant
            raise RuntimeError("sparse_kd_loss has no second derivative: call backward without create_graph")
        grad_NV = ctx.saved_tensors[0].detach()
        if ctx.backend == "reference":
            return scaled(grad_NV, upstream), None, None, None, None, None
        if ctx.spent:
            raise RuntimeError(
                "sparse_kd_loss was differentiated twice, wanted once: its Triton kernel scales the gradient where it "
                "lies, without waiting for the device; call the loss again, or take impl='reference'"
            )
        from stillroom.kernels.sparse_kd import triton

        ctx.spent = True
        triton.scale_(grad_NV, upstream)
        return grad_NV, None, None, None, None, None


def scaled(grad_NV: Tensor, upstream: Tensor) -> Tensor:
    """`grad_NV` times a scalar, or row by row times `[N]`; rounded once, and no pass over it for a scalar of 1."""
    if upstream.dim() == 0:
        scale = float(upstream)  # a Python number: half precision must not round it first
        return grad_NV if scale == 1.0 else grad_NV * scale
    if upstream.dtype == grad_NV.dtype:
        return grad_NV * upstream.unsqueeze(1)
    out_NV = torch.empty_like(grad_NV)
    step = max(1, reference.BLOCK_ELEMENTS // grad_NV.shape[1])
    for part_NV, scale_N, to_NV in zip(
        torch.split(grad_NV, step), torch.split(upstream, step), torch.split(out_NV, step)
    ):
        to_NV.copy_(part_NV.to(upstream.dtype) * scale_N.unsqueeze(1))
    return out_NV
