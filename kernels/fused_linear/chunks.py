"""The loss and its gradients, one chunk of logits after the other.

What it replaces:

    logits = logit_scale * (hidden @ weight.T + bias);  logits = softcap * tanh(logits / softcap)
    loss = sparse_kd_loss(logits, ...).loss;  loss.backward()

A chunk's logits are turned into their gradient in place, and that goes into the gradients of hidden states, weight and
bias at once, so nothing of the logits' size outlives its chunk. Padded columns of the head are never multiplied.

Shapes: `N` rows, `V` vocabulary, `D` width; in a chunk `M` rows; `L` rows with a weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.kernels.fused_linear.gemm import multiply_into
from stillroom.kernels.fused_linear.plan import COLUMNS, accumulator, rows_per_chunk
from stillroom.kernels.fused_linear.spec import Spec
from stillroom.kernels.sparse_kd.loss import loss_and_gradient
from stillroom.kernels.sparse_kd.problem import Problem, TargetSplit
from stillroom.kernels.targets import SparseTargets

CAP_ELEMENTS = 1 << 22  # logits soft-capped at a time, in float32


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which gradients are to be made."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def any(self) -> bool:
        """Whether one is."""
        return self.hidden or self.weight or self.bias


@dataclass(frozen=True, slots=True)
class Result:
    """Values by row and the wanted gradients of their sum; the others have no elements.

    Attributes:
        loss_N: `[N]` float64.
        kd_N: `[N]`.
        ce_N: `[N]`.
        hidden_ND: gradient, in the hidden states' dtype.
        weight_VD: gradient, in the dtype `Spec.sum_dtype` says.
        bias_V: gradient, float32 or float64.
    """

    loss_N: Tensor
    kd_N: Tensor
    ce_N: Tensor
    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor


def run(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, spec: Spec, wanted: Wanted) -> Result:
    """Loss and gradients of all rows; without a wanted gradient the loss alone."""
    with torch.autocast(hidden_ND.device.type, enabled=False):  # the types are chosen here
        return _run(hidden_ND, weight_VD, bias_V, spec, wanted)


def _run(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, spec: Spec, wanted: Wanted) -> Result:
    (rows, width), dtype = hidden_ND.shape, spec.dtype
    problem, live_L = spec.problem, None
    if spec.compact:
        live_N = problem.weight_N != 0
        if not bool(live_N.all()):
            live_L = live_N.nonzero().squeeze(1)
            problem = take_rows(problem, live_N, live_L)
    compute = problem.weight_N.dtype
    loss_N, kd_N, ce_N = (hidden_ND.new_zeros(rows, dtype=t) for t in (torch.float64, compute, compute))
    used_VD = weight_VD[: spec.vocabulary].to(dtype)
    used_bias_V = None if bias_V is None else bias_V[: spec.vocabulary].to(dtype)

    empty = hidden_ND.new_empty
    to_hidden_ND = empty(rows if wanted.hidden else 0, width)
    to_weight_VD = empty(
        len(weight_VD) if wanted.weight else 0, width, dtype=spec.sum_dtype(rows, weight_VD, wanted.weight)
    )
    to_bias_V = hidden_ND.new_zeros(len(weight_VD) if wanted.bias else 0, dtype=accumulator(dtype))
    if live_L is not None:
        to_hidden_ND.zero_()
    if problem.rows:
        to_weight_VD[spec.vocabulary :].zero_()  # padded columns
    else:
        to_weight_VD.zero_()

    most = min(problem.rows, rows_per_chunk(rows, width, dtype, spec.chunk_rows, wanted.weight))
    columns = -(-spec.vocabulary // COLUMNS) * COLUMNS
    buffers = [empty(most, columns, dtype=dtype)[:, : spec.vocabulary]]
    if spec.softcap is not None and wanted.any:
        buffers.append(torch.empty_like(buffers[0]))
    for part in _parts(problem.rows, most):
        where: slice | Tensor = part if live_L is None else live_L[part]
        hidden_MD = hidden_ND[where].to(dtype)
        raw_MV = buffers[0][: len(hidden_MD)]
        _logits(raw_MV, hidden_MD, used_VD, used_bias_V, spec.logit_scale)
        logits_MV = buffers[-1][: len(hidden_MD)]
        if spec.softcap is not None:
            soft_cap(raw_MV, logits_MV, spec.softcap)
        found = loss_and_gradient(logits_MV, problem.part(part), logits_MV if wanted.any else None, spec.impl)
        for to_N, from_M in zip((loss_N, kd_N, ce_N), (found.loss_N, found.kd_N, found.ce_N)):
            to_N[where] = from_M
        if not wanted.any:
            continue
        if spec.softcap is not None:
            soft_cap_gradient(logits_MV, raw_MV, spec.softcap)
        if wanted.hidden:
            if live_L is None and to_hidden_ND.dtype == dtype:
                multiply_into(to_hidden_ND[part], logits_MV, used_VD, scale=spec.logit_scale)
            else:
                to_hidden_MD = empty(hidden_MD.shape, dtype=dtype)
                multiply_into(to_hidden_MD, logits_MV, used_VD, scale=spec.logit_scale)
                to_hidden_ND[where] = to_hidden_MD.to(to_hidden_ND.dtype)
        if wanted.weight:
            multiply_into(
                to_weight_VD[: spec.vocabulary], logits_MV.t(), hidden_MD, scale=spec.logit_scale, add=part.start > 0
            )
        if wanted.bias:
            to_bias_V[: spec.vocabulary].add_(logits_MV.sum(0, dtype=to_bias_V.dtype), alpha=spec.logit_scale)
    return Result(loss_N, kd_N, ce_N, to_hidden_ND, to_weight_VD, to_bias_V)


def _parts(rows: int, most: int) -> Iterator[slice]:
    """Chunks of nearly the same number of rows, a multiple of 64 where that fits: a short last one would be a thin GEMM."""
    if not rows:
        return
    step = -(-rows // -(-rows // most))
    step = min(most, -(-step // 64) * 64)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _logits(out_MV: Tensor, hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, scale: float) -> None:
    if bias_V is None:
        multiply_into(out_MV, hidden_MD, weight_VD.t(), scale=scale)
    else:  # inside the GEMM, so that the sum is rounded once
        torch.addmm(bias_V, hidden_MD, weight_VD.t(), beta=scale, alpha=scale, out=out_MV)


def soft_cap(raw_MV: Tensor, out_MV: Tensor, cap: float) -> None:
    """out = cap * tanh(raw / cap), rounded once; `out_MV` may be `raw_MV`."""
    for raw_RV, out_RV in _blocks(raw_MV, out_MV):
        out_RV.copy_((raw_RV.to(accumulator(raw_RV.dtype)) / cap).tanh_().mul_(cap))


def soft_cap_gradient(grad_MV: Tensor, raw_MV: Tensor, cap: float) -> None:
    """grad *= 1 - tanh(raw / cap)**2, from the logits before the cap: from rounded ones after it nothing is left of 1 - 1."""
    for grad_RV, raw_RV in _blocks(grad_MV, raw_MV):
        # 1 / cosh**2: keeps its digits where tanh is 1 to the last bit
        slope_RV = (raw_RV.to(accumulator(raw_RV.dtype)) / cap).cosh_().pow_(-2)
        grad_RV.copy_(grad_RV * slope_RV)


def _blocks(a_MV: Tensor, b_MV: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    step = max(1, CAP_ELEMENTS // a_MV.shape[1])
    for start in range(0, len(a_MV), step):
        yield a_MV[start : start + step], b_MV[start : start + step]


def take_rows(problem: Problem, live_N: Tensor, live_L: Tensor) -> Problem:
    """The problem of the rows `live_L` alone, with their entries alone."""
    targets, split = problem.targets, problem.split
    if targets is not None:
        count_N = targets.offsets.diff()
        entry_E = torch.arange(targets.ids.numel(), device=live_N.device)
        row_E = (
            torch.searchsorted(targets.offsets, entry_E, right=True) - 1
        )  # of a part, entries may lie before and behind
        inside_E = (row_E >= 0) & (row_E < problem.rows)
        kept = (inside_E & live_N[row_E.clamp(0, problem.rows - 1)]).nonzero().squeeze(1)
        targets = SparseTargets(
            torch.cat((count_N.new_zeros(1), count_N[live_L].cumsum(0))),
            targets.ids[kept],
            targets.weights[kept],
            targets.label_logp[live_L],
            targets.entropy[live_L],
            None if targets.logp is None else targets.logp[kept],
        )
    if split is not None:
        split = TargetSplit(split.tkd_N[live_L], split.dkd_N[live_L])
    return Problem(
        targets,
        problem.labels_N[live_L],
        problem.weight_N[live_L],
        problem.alpha,
        problem.divergence,
        problem.parameter,
        problem.temperature,
        problem.missing,
        split,
    )
