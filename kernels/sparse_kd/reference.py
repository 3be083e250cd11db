"""The distillation loss in plain PyTorch, its gradient in closed form. No Triton; this is also the CPU path.

What it replaces, for forward KL with dense teacher probabilities p:

    logq = logits.log_softmax(-1)
    loss = (row_weight * ((1 - alpha) * (p * (p.log() - logq)).sum(-1) + alpha * F.cross_entropy(logits, labels))).sum()

A row's gradient is a scalar times its softmax, corrected at the kept ids and the label (`divergence.py` has the formula). So the
forward writes one softmax into the gradient's buffer, scales its rows and puts the few corrected values in their
places; about one `[N, V]` buffer beside the logits is ever alive, and backward only multiplies by the upstream gradient.
Corrections are computed in float32, p - w before any rounding, and a bfloat16 gradient is rounded once.

Shapes: `N` rows, `V` vocabulary, `E` entries; inside a block of rows `R` rows.
"""

from __future__ import annotations

from typing import Final, cast

import torch
from torch import Tensor

from stillroom.kernels.sparse_kd.divergence import DIVERGENCES
from stillroom.kernels.sparse_kd.problem import Problem
from stillroom.kernels.sparse_kd.rows import Block, block_loss

# Logits in work at a time: 16 MiB where they need working memory. Where they need none, steps are longer, because threads
# wait for each other at the end of every operation, and on a busy machine that is what takes the time.
BLOCK_ELEMENTS: Final = 1 << 22
DIRECT_ELEMENTS: Final = 1 << 24


def loss_and_gradient(logits_NV: Tensor, problem: Problem, grad_NV: Tensor | None) -> tuple[Tensor, Tensor]:
    """KD and CE of every row; the gradient goes to `grad_NV`, which may be the logits themselves."""
    rows, vocabulary = logits_NV.shape
    compute = problem.weight_N.dtype
    kd_N, ce_N = logits_NV.new_zeros(rows, dtype=compute), logits_NV.new_zeros(rows, dtype=compute)
    direct = grad_NV is not None and grad_NV is not logits_NV and grad_NV.dtype == compute
    in_place = direct and problem.missing != "tail_bucket" and problem.split is None and problem.temperature == 1.0
    step = max(1, (DIRECT_ELEMENTS if in_place else BLOCK_ELEMENTS) // vocabulary)
    scratch_RV = None if direct else logits_NV.new_empty(min(step, rows), vocabulary, dtype=compute)
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        dead_R = problem.weight_N[part] == 0
        if bool(dead_R.all()):
            if grad_NV is not None:
                grad_NV[part] = 0.0
            continue
        buffer_RV = scratch_RV[: part.stop - start] if scratch_RV is not None else cast(Tensor, grad_NV)[part]
        kd_R, ce_R = block_loss(_block(logits_NV[part], problem.part(part)), buffer_RV, problem, grad_NV is not None)
        kd_N[part], ce_N[part] = kd_R.masked_fill_(dead_R, 0.0), ce_R.masked_fill_(dead_R, 0.0)
        if grad_NV is not None:
            if bool(dead_R.any()):
                buffer_RV[dead_R] = 0.0  # 0 times an infinite or NaN logit's softmax would not be 0
            if not direct:
                grad_NV[part] = buffer_RV
    return kd_N, ce_N


def _block(logits_RV: Tensor, part: Problem) -> Block:
    targets, weight_R, label_R = part.targets, part.weight_N, part.labels_N
    compute, split = weight_R.dtype, None
    if targets is None:
        row_E = id_E = label_R.new_zeros(0)
        weight_E = logp_E = weight_R.new_zeros(0)
    else:
        entries = slice(int(targets.offsets[0]), int(targets.offsets[-1]))
        row_E = torch.arange(len(label_R), device=label_R.device).repeat_interleave(targets.offsets.diff())
        id_E = targets.ids[entries].to(torch.int64)
        weight_E = logp_E = targets.weights[entries].to(compute)
        if DIVERGENCES[part.divergence].needs_logp:
            logp_E = cast(Tensor, targets.logp)[entries].to(compute)
        if part.split is not None:
            split = (targets.label_logp.to(compute), part.split.tkd_N.to(compute), part.split.dkd_N.to(compute))
    return Block(
        logits_RV=logits_RV,
        row_E=row_E,
        id_E=id_E,
        weight_E=weight_E,
        logp_E=logp_E,
        label_R=label_R,
        kd_scale_R=weight_R * (1.0 - part.alpha),
        ce_scale_R=weight_R * part.alpha,
        split=split,
    )
