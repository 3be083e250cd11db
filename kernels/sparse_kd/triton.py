"""The distillation loss as Triton kernels: launchers, in the terms of `reference.py`. The kernels are in `kernels_triton.py`.

One program owns one row: it gathers the logits of the row's entries, streams the row for its sums, decides value and
coefficients from the entries, streams the row again and writes the gradient, then overwrites the entries with values
computed in float32 from the logits gathered first. The row is read twice, the second time from the L2 cache where it
fits, and written once; the same code serves a gradient of its own and one over the logits.

Shapes: `N` rows, `V` vocabulary, `E` entries, `W` words of 32 ids.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, cast

import torch
from torch import Tensor

from stillroom.kernels.backend import interpreted
from stillroom.kernels.sparse_kd.divergence import DIVERGENCES
from stillroom.kernels.sparse_kd.kernels_triton import mark_kernel, rows_kernel, scale_kernel
from stillroom.kernels.sparse_kd.problem import MISSING_MASS, Problem
from stillroom.kernels.tuning import launch

# exp((x - m) / T) to an exponential at T = 1 by multiplication, for these T; two exponentials otherwise
_POWERS = {1.0: 0, 2.0: 2, 3.0: 3, 4.0: 4}


def loss_and_gradient(logits_NV: Tensor, problem: Problem, grad_NV: Tensor | None) -> tuple[Tensor, Tensor]:
    """KD and CE of every row; the gradient goes to `grad_NV`, which may be the logits themselves."""
    rows, vocabulary = logits_NV.shape
    kd_N, ce_N = (logits_NV.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if rows == 0:
        return kd_N, ce_N
    x_NV = logits_NV if logits_NV.stride(1) == 1 else logits_NV.contiguous()
    g_NV = grad_NV
    if grad_NV is not None and grad_NV.stride(1) != 1:
        g_NV = torch.empty_like(grad_NV, memory_format=torch.contiguous_format)
    targets, split, labels_N = problem.targets, problem.split, problem.labels_N
    entries = 0 if targets is None else targets.ids.numel()
    k_block = min(1024, max(32, _power_of_two(problem.mean_entries or 0)))
    holes_NW = None
    with _on(x_NV):
        if targets is not None and (split is not None or problem.missing == "tail_bucket"):
            holes_NW = x_NV.new_zeros(rows, -(-vocabulary // 32), dtype=torch.int32)
            mark_kernel[(rows,)](
                holes_NW, holes_NW.shape[1], targets.offsets, targets.ids, labels_N.contiguous(), vocabulary,
                LABEL=split is not None, KBLOCK=64, num_warps=launch("sparse_kd.mark", vocabulary).num_warps,
            )  # fmt: skip
        how = launch("sparse_kd.rows", vocabulary)
        rows_kernel[(rows,)](
            x_NV, x_NV.stride(0), g_NV, 0 if g_NV is None else g_NV.stride(0),
            None if targets is None else targets.offsets.contiguous(),
            None if targets is None else targets.ids.contiguous(),
            None if targets is None else targets.weights.contiguous(),
            targets.logp.contiguous() if targets is not None and targets.logp is not None else None,
            labels_N.contiguous(), problem.weight_N.contiguous(),
            None if split is None else cast(Any, targets).label_logp.contiguous(),
            None if split is None else split.tkd_N.float().contiguous(),
            None if split is None else split.dkd_N.float().contiguous(),
            x_NV.new_empty(entries, dtype=torch.float32), holes_NW, 0 if holes_NW is None else holes_NW.shape[1],
            kd_N, ce_N, vocabulary, float(problem.alpha), float(problem.temperature), *_numbers(problem),
            TARGETS=targets is not None, DIVERGENCE=tuple(DIVERGENCES).index(problem.divergence),
            MISSING=MISSING_MASS.index(problem.missing), SPLIT=split is not None, HOLES=holes_NW is not None,
            POWER=_POWERS.get(problem.temperature, 1), GRADIENT=g_NV is not None, EMULATE=_emulate(x_NV),
            KBLOCK=k_block, BLOCK=how.block, num_warps=how.num_warps,
        )  # fmt: skip
    if grad_NV is not None and g_NV is not None:
        if g_NV is not grad_NV:
            grad_NV.copy_(g_NV)
        else:  # autograd does not see what a kernel writes
            torch.autograd.graph.increment_version(grad_NV)
    return kd_N, ce_N


def scale_(grad_NV: Tensor, upstream: Tensor) -> None:
    """`grad_NV` times a scalar, or row by row times `[N]`, in place; rows times 1 are not read. No wait for the device."""
    rows, vocabulary = grad_NV.shape
    if rows == 0 or vocabulary == 0:
        return
    scale_N = upstream.to(torch.float32).contiguous()
    g_NV = grad_NV if grad_NV.stride(1) == 1 else grad_NV.contiguous()
    how = launch("sparse_kd.scale", vocabulary)
    with _on(g_NV):
        scale_kernel[(rows,)](
            g_NV, g_NV.stride(0), scale_N, int(scale_N.dim() == 1), vocabulary,
            EMULATE=_emulate(g_NV), BLOCK=how.block, num_warps=how.num_warps,
        )  # fmt: skip
    if g_NV is not grad_NV:
        grad_NV.copy_(g_NV)


def _numbers(problem: Problem) -> tuple[float, float, float, float, float]:
    """What the kernel needs of the divergence's parameter: log share, log(1 - share), log a, a, the constant."""
    share, name = problem.parameter, problem.divergence
    if DIVERGENCES[name].parameter is None:
        return 0.0, 0.0, 0.0, 1.0, DIVERGENCES[name].constant(share)
    a = share / (1.0 - share) if name == "jsd" else (1.0 - share) / share
    return math.log(share), math.log1p(-share), math.log(a), a, DIVERGENCES[name].constant(share)


def _emulate(tensor: Tensor) -> bool:
    """The interpreter cuts a float32 down to bfloat16 where a GPU rounds it."""
    return interpreted() and tensor.dtype == torch.bfloat16


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the tensors are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
