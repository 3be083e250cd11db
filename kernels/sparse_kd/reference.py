"""The distillation loss in plain PyTorch, its gradient in closed form. No Triton; this is also the CPU path.

What it replaces, with dense teacher probabilities p:

    logq = logits.log_softmax(-1)
    loss = (row_weight * ((1 - alpha) * (p * (p.log() - logq)).sum(-1) + alpha * F.cross_entropy(logits, labels))).sum()

A row's gradient is a scalar times its softmax, corrected at the kept ids and the label (`divergence.py` has the formula). So the
forward writes one softmax into the gradient's buffer, scales its rows and puts the few corrected values in their
places; about one `[N, V]` buffer beside the logits is ever alive, and backward only multiplies by the upstream scalar.
Corrections are computed in float32, p - w before any rounding, and a bfloat16 gradient is rounded once.

Shapes: `N` rows, `V` vocabulary, `E` entries; inside a block of rows `R` rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor

from stillroom.kernels.sparse_kd.divergence import DIVERGENCES, Divergence
from stillroom.kernels.sparse_kd.rows import Block, block_loss
from stillroom.kernels.targets import SparseTargets

MISSING_MASS: Final = ("truncate", "renormalise_teacher", "renormalise_both", "tail_bucket")
IGNORE_LABEL: Final = -100
# Logits in work at a time: 16 MiB where they need working memory. Where they need none, steps are longer, because threads
# wait for each other at the end of every operation, and on a busy machine that is what takes the time.
BLOCK_ELEMENTS: Final = 1 << 22
DIRECT_ELEMENTS: Final = 1 << 24


@dataclass(frozen=True, slots=True)
class SparseKDOutput:
    """What `sparse_kd_loss` returns.

    Attributes:
        loss: scalar, float32 (float64 for float64 logits), carries the gradient.
        kd_N: `[N]`, divergence of every row, nats, detached; 0 for an ignored row or one without targets.
        ce_N: `[N]`, cross-entropy with the label, nats, detached; 0 for an ignored row.
    """

    loss: Tensor
    kd_N: Tensor
    ce_N: Tensor


def sparse_kd_loss(
    logits_NV: Tensor,
    targets: SparseTargets | None,
    labels_N: Tensor,
    *,
    alpha: float = 0.0,
    missing: str = "truncate",
    row_weights_N: Tensor | None = None,
    inplace: bool = False,
) -> SparseKDOutput:
    """Forward KL to sparse targets mixed with cross-entropy: sum of row_weight * ((1 - alpha) * KD + alpha * CE).

    KD of a row is sum_k w_k (log w_k - log q_k) over its targets, 0 log 0 = 0; a row without targets has KD = 0 and
    contributes its cross-entropy alone. What happens to the mass 1 - sum(w) a target lacks is `missing`:

    - `truncate`: nothing. Exact for sampled targets, which sum to 1.
    - `renormalise_teacher`: w is divided by its sum.
    - `renormalise_both`: so is w, and q by the student's mass on the same ids. Student mass elsewhere costs nothing.
    - `tail_bucket`: one more entry, the teacher's missing mass against the student's mass outside the kept ids, which
      is summed directly, not as 1 - sum(q).

    Args:
        logits_NV: `[N, V]` float32, bfloat16, float16 or float64, any strides. The student's.
        targets: targets of the same rows, ids unique within a row (not checked); None for cross-entropy alone (alpha 1).
        labels_N: `[N]` int64; -100 ignores the row: no loss, zero gradient.
        alpha: share of the hard-label cross-entropy, 0 to 1.
        missing: one of `MISSING_MASS`.
        row_weights_N: `[N]` floating point, constants; 0 ignores the row. Default: 1 / number of rows with a label (so
            the loss is a mean over them; 0 when there are none). A constant factor of the loss, such as one over the
            number of accumulation steps, is cheapest here: elsewhere it costs a pass over the gradient.
        inplace: give up the logits: the gradient is written over them, which saves the `[N, V]` buffer. They
            must not be used afterwards, by the caller or by an earlier operation's backward (autograd raises if one
            saved them). Ignored when no gradient is wanted.

    Returns:
        Loss, and KD and CE by row.

    Raises:
        ValueError: an argument of the wrong shape, type, device or range.
    """
    _check(logits_NV, targets, labels_N, alpha, missing, row_weights_N)
    live_N = labels_N != IGNORE_LABEL
    compute = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    if row_weights_N is None:
        weight_N = live_N.to(compute) / live_N.sum().clamp_min(1)
    else:
        weight_N = torch.where(live_N, row_weights_N.to(compute), 0.0)
    problem = _Problem(targets, labels_N, weight_N, alpha, missing, DIVERGENCES["forward_kl"])
    wanted = logits_NV.requires_grad and torch.is_grad_enabled()
    loss, kd_N, ce_N = _SparseKD.apply(logits_NV, problem, wanted, inplace)  # type: ignore[no-untyped-call]
    return SparseKDOutput(loss, kd_N, ce_N)


@dataclass(frozen=True, slots=True)
class _Problem:
    """Everything about the loss but the logits."""

    targets: SparseTargets | None
    labels_N: Tensor
    weight_N: Tensor
    alpha: float
    missing: str
    divergence: Divergence


class _SparseKD(torch.autograd.Function):
    """The gradient is ready when forward returns; backward scales it."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, problem: _Problem, wanted: bool, inplace: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_NV = None
        if wanted:
            grad_NV = logits_NV if inplace else torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
        kd_N, ce_N = _loss_and_gradient(logits_NV, problem, grad_NV)
        row_N = torch.zeros_like(kd_N, dtype=torch.float64)
        for share, part_N in ((1.0 - problem.alpha, kd_N), (problem.alpha, ce_N)):
            if share:  # else a label or target the student excludes would make 0 * inf of it
                row_N += share * part_N.double()
        loss = (problem.weight_N.double() * row_N).sum().to(kd_N.dtype)
        if grad_NV is not None:
            ctx.save_for_backward(grad_NV)
        ctx.mark_non_differentiable(kd_N, ce_N)
        return loss, kd_N, ce_N

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():  # create_graph=True: the gradient would silently pass for a constant
            raise RuntimeError("sparse_kd_loss has no second derivative: call backward without create_graph")
        (grad_NV,) = ctx.saved_tensors
        grad_NV, scale = grad_NV.detach(), float(upstream)  # a Python number: half precision must not round it first
        return (grad_NV if scale == 1.0 else grad_NV * scale), None, None, None


def _loss_and_gradient(logits_NV: Tensor, problem: _Problem, grad_NV: Tensor | None) -> tuple[Tensor, Tensor]:
    """KD and CE of every row; the gradient goes to `grad_NV`, which may be the logits themselves."""
    rows, vocabulary = logits_NV.shape
    compute = problem.weight_N.dtype
    kd_N, ce_N = logits_NV.new_zeros(2, rows, dtype=compute)
    direct = grad_NV is not None and grad_NV is not logits_NV and grad_NV.dtype == compute
    elements = DIRECT_ELEMENTS if direct and problem.missing != "tail_bucket" else BLOCK_ELEMENTS
    step = max(1, elements // vocabulary)
    scratch_RV = None if direct else logits_NV.new_empty(min(step, rows), vocabulary, dtype=compute)
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        dead_R = problem.weight_N[part] == 0
        if bool(dead_R.all()):
            if grad_NV is not None:
                grad_NV[part] = 0.0
            continue
        buffer_RV = scratch_RV[: part.stop - start] if scratch_RV is not None else cast(Tensor, grad_NV)[part]
        block = _block(logits_NV, problem, part)
        kd_R, ce_R = block_loss(block, buffer_RV, problem.missing, problem.divergence, grad_NV is not None)
        kd_N[part], ce_N[part] = kd_R.masked_fill_(dead_R, 0.0), ce_R.masked_fill_(dead_R, 0.0)
        if grad_NV is not None:
            if bool(dead_R.any()):
                buffer_RV[dead_R] = 0.0  # 0 times an infinite or NaN logit's softmax would not be 0
            if not direct:
                grad_NV[part] = buffer_RV
    return kd_N, ce_N


def _block(logits_NV: Tensor, problem: _Problem, part: slice) -> Block:
    targets, weight_R = problem.targets, problem.weight_N[part]
    label_R = problem.labels_N[part]
    if targets is None:
        row_E = id_E = label_R.new_zeros(0)
        weight_E = weight_R.new_zeros(0)
    else:
        offset_R1 = targets.offsets[part.start : part.stop + 1]
        entries = slice(int(offset_R1[0]), int(offset_R1[-1]))
        row_E = torch.arange(len(label_R), device=label_R.device).repeat_interleave(offset_R1.diff())
        id_E = targets.ids[entries].to(torch.int64)
        weight_E = targets.weights[entries].to(weight_R.dtype)
    return Block(
        logits_RV=logits_NV[part],
        row_E=row_E,
        id_E=id_E,
        weight_E=weight_E,
        label_R=label_R,
        kd_scale_R=weight_R * (1.0 - problem.alpha),
        ce_scale_R=weight_R * problem.alpha,
    )


def _check(
    logits_NV: Tensor,
    targets: SparseTargets | None,
    labels_N: Tensor,
    alpha: float,
    missing: str,
    row_weights_N: Tensor | None,
) -> None:
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if logits_NV.dim() != 2 or logits_NV.dtype not in floats or logits_NV.shape[1] < 1:
        raise ValueError(
            f"`logits_NV` came as {logits_NV.dtype}{list(logits_NV.shape)}, wanted floating point [N, V]: "
            "flatten the batch with `logits.flatten(0, 1)`"
        )
    rows, vocabulary = logits_NV.shape
    if labels_N.dtype != torch.int64 or labels_N.shape != (rows,) or labels_N.device != logits_NV.device:
        raise ValueError(
            f"`labels_N` came as {labels_N.dtype}{list(labels_N.shape)} on {labels_N.device}, wanted int64[{rows}] "
            f"on {logits_NV.device}: one label for each row of `logits_NV`"
        )
    _check_ids("labels_N", labels_N[labels_N != IGNORE_LABEL], vocabulary, f", or {IGNORE_LABEL} to ignore the row")
    if not 0.0 <= alpha <= 1.0 or (targets is None and alpha != 1.0):
        raise ValueError(
            f"`alpha` came as {alpha}{' without targets' if targets is None else ''}, wanted 0 to 1, the share of the "
            "cross-entropy; without targets only alpha=1 has a meaning"
        )
    if missing not in MISSING_MASS:
        raise ValueError(f"`missing` came as {missing!r}: choose one of {', '.join(MISSING_MASS)}")
    if targets is not None:
        if targets.rows != rows or targets.ids.device != logits_NV.device:
            raise ValueError(
                f"`targets` came with {targets.rows} rows on {targets.ids.device}, wanted {rows} on {logits_NV.device}: "
                "one row for each row of `logits_NV`; `targets.to(device)` moves them"
            )
        _check_ids("targets.ids", targets.ids, vocabulary, ": pad the student's vocabulary or use the teacher's")
    if row_weights_N is not None and (
        row_weights_N.shape != (rows,)
        or not row_weights_N.is_floating_point()
        or row_weights_N.device != logits_NV.device
        or row_weights_N.requires_grad
    ):
        raise ValueError(
            f"`row_weights_N` came as {row_weights_N.dtype}{list(row_weights_N.shape)} on {row_weights_N.device}"
            f"{', requiring a gradient' if row_weights_N.requires_grad else ''}; wanted floating point [{rows}] on "
            f"{logits_NV.device} without one: they are constants, so detach them"
        )


def _check_ids(name: str, ids: Tensor, vocabulary: int, remedy: str) -> None:
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(
            f"`{name}` run from {int(ids.min())} to {int(ids.max())}, wanted 0 to {vocabulary - 1}, the width of "
            f"`logits_NV`{remedy}"
        )
