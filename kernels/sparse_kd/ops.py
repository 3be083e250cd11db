"""The loss as a `torch.library` operator, so that `torch.compile` keeps it whole in one graph.

Eager code does not come here: an operator may not return or give up its input, and the gradient over the logits
(`inplace=True`) needs both. Under `torch.compile` the gradient has a buffer of its own.

Shapes: `N` rows, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stillroom.kernels.sparse_kd.problem import Problem, TargetSplit, check_values
from stillroom.kernels.targets import SparseTargets


def values_and_gradient(
    logits_NV: Tensor, problem: Problem, wanted: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """KD, CE and loss of every row as `loss.loss_and_gradient` has them; the last carries the gradient."""
    targets, split = problem.targets, problem.split
    given: tuple[Tensor | None, ...] = (None,) * 6
    if targets is not None:
        given = (
            targets.offsets,
            targets.ids,
            targets.weights,
            targets.label_logp,
            targets.entropy,
            targets.logp,
        )
    kd_N, ce_N, loss_N, _ = _operator(
        logits_NV,
        *given,
        problem.labels_N,
        problem.weight_N,
        None if split is None else split.tkd_N,
        None if split is None else split.dkd_N,
        problem.alpha,
        problem.divergence,
        problem.parameter,
        problem.temperature,
        problem.missing,
        wanted,
        backend,
    )
    return kd_N.detach(), ce_N.detach(), loss_N


@torch.library.custom_op("stillroom::sparse_kd", mutates_args=())
def _operator(
    logits_NV: Tensor,
    offsets: Tensor | None,
    ids: Tensor | None,
    weights: Tensor | None,
    label_logp: Tensor | None,
    entropy: Tensor | None,
    logp: Tensor | None,
    labels_N: Tensor,
    weight_N: Tensor,
    tkd_N: Tensor | None,
    dkd_N: Tensor | None,
    alpha: float,
    divergence: str,
    parameter: float,
    temperature: float,
    missing: str,
    wanted: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from stillroom.kernels.sparse_kd.loss import loss_and_gradient  # it imports this module

    targets = split = None
    if (
        offsets is not None
        and ids is not None
        and weights is not None
        and label_logp is not None
        and entropy is not None
    ):
        targets = SparseTargets(offsets, ids, weights, label_logp, entropy, logp)
    if tkd_N is not None and dkd_N is not None:
        split = TargetSplit(tkd_N, dkd_N)
    problem = Problem(targets, labels_N, weight_N, alpha, divergence, parameter, temperature, missing, split)
    if not logits_NV.is_cuda:
        check_values(problem, logits_NV.shape[1])
    grad_NV = logits_NV.new_empty(logits_NV.shape if wanted else (0, logits_NV.shape[1]))
    rows = loss_and_gradient(logits_NV, problem, grad_NV if wanted else None, backend)
    return rows.kd_N, rows.ce_N, rows.loss_N, grad_NV


@_operator.register_fake
def _(logits_NV: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight_N, wanted = arguments[7], arguments[15]
    return (
        torch.empty_like(weight_N),
        torch.empty_like(weight_N),
        torch.empty_like(weight_N, dtype=torch.float64),
        logits_NV.new_empty(logits_NV.shape if wanted else (0, logits_NV.shape[1])),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[3])


def _backward(ctx: Any, kd: Tensor, ce: Tensor, upstream_N: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
    (grad_NV,) = ctx.saved_tensors
    compute = torch.promote_types(grad_NV.dtype, torch.float32)
    return (grad_NV * upstream_N.to(compute).unsqueeze(1)).to(grad_NV.dtype), *([None] * 17)


_operator.register_autograd(_backward, setup_context=_keep)
