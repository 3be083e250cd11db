"""Buckets of a row and their gradient in plain PyTorch. No Triton; this is also the CPU path.

What it replaces, for one row with support S, label y and temperature T:

    support = z[S]
    label = z[y]
    tail = (z[every j not in S, not y] / T).logsumexp(0)

The support is punched out (-inf) of a working copy before the sum, so the tail is what it says, not 1 minus the rest. Its
gradient is one number per row and temperature times a softmax: d tail / dz_j = exp(z_j / T - tail) / T outside S and y, else 0.

A rank that holds the ids `vocab_start ... vocab_start + V - 1` passes its slice of the logits: ids and labels of other
ranks are masked, their logits come back as 0 and get no gradient.

Shapes: `N` rows, `V` columns of the logits, `E` entries, `T` temperatures; inside a block of rows `R` rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

BLOCK_ELEMENTS: Final = 1 << 22  # logits in work at a time: 16 MiB of float32


def compute_dtype(logits_NV: Tensor) -> torch.dtype:
    """float64 for float64 logits, else float32."""
    return torch.float64 if logits_NV.dtype == torch.float64 else torch.float32


def forward(
    logits_NV: Tensor,
    offsets: Tensor,
    ids: Tensor,
    labels_N: Tensor | None,
    temperatures: Sequence[float],
    vocab_start: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Support logits `[E]`, label logits `[N]` (0 without a label), tail log-sum-exps `[N, T]`."""
    compute = compute_dtype(logits_NV)
    support_E = logits_NV.new_zeros(len(ids), dtype=compute)
    label_N = logits_NV.new_zeros(len(logits_NV), dtype=compute)
    tail_NT = logits_NV.new_empty(len(logits_NV), len(temperatures), dtype=compute)
    for rows, entries, (row_E, id_E, mine_E), (at_L, id_L) in _blocks(logits_NV, offsets, ids, labels_N, vocab_start):
        punched_RV = logits_NV[rows].to(compute, copy=True)
        support_E[entries] = torch.where(mine_E, punched_RV[row_E, id_E], 0.0)
        label_N[rows][at_L] = punched_RV[at_L, id_L]
        punched_RV[row_E[mine_E], id_E[mine_E]] = -torch.inf
        punched_RV[at_L, id_L] = -torch.inf
        for t, temperature in enumerate(temperatures):
            tail_NT[rows, t] = torch.logsumexp(punched_RV / temperature, 1)
    return support_E, label_N, tail_NT


def backward(
    logits_NV: Tensor,
    offsets: Tensor,
    ids: Tensor,
    labels_N: Tensor | None,
    tail_NT: Tensor,
    grad_support_E: Tensor,
    grad_label_N: Tensor,
    grad_tail_NT: Tensor,
    temperatures: Sequence[float],
    vocab_start: int,
) -> Tensor:
    """Gradient of the logits, `[N, V]` in their dtype, rounded once."""
    grad_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
    # an empty tail is a constant: whatever gradient arrives there, NaN included, goes nowhere
    filled_NT = tail_NT > -torch.inf
    pull_NT = torch.where(filled_NT, grad_tail_NT, 0.0)
    tail_NT = torch.where(filled_NT, tail_NT, 0.0)
    for rows, entries, (row_E, id_E, mine_E), (at_L, id_L) in _blocks(logits_NV, offsets, ids, labels_N, vocab_start):
        logits_RV = logits_NV[rows].to(tail_NT.dtype)
        grad_RV = torch.zeros_like(logits_RV)
        for t, temperature in enumerate(temperatures):
            share_RV = (logits_RV / temperature).sub_(tail_NT[rows, t, None]).clamp_(max=0.0).exp_()
            grad_RV.addcmul_(share_RV, pull_NT[rows, t, None], value=1.0 / temperature)
        row_E, id_E = row_E[mine_E], id_E[mine_E]
        grad_RV[row_E, id_E] = 0.0
        grad_RV[at_L, id_L] = 0.0
        grad_RV.index_put_((row_E, id_E), grad_support_E[entries][mine_E], accumulate=True)
        grad_RV.index_put_((at_L, id_L), grad_label_N[rows][at_L], accumulate=True)
        grad_NV[rows] = grad_RV
    return grad_NV


Entries = tuple[Tensor, Tensor, Tensor]


def _blocks(
    logits_NV: Tensor, offsets: Tensor, ids: Tensor, labels_N: Tensor | None, vocab_start: int
) -> Iterator[tuple[slice, slice, Entries, tuple[Tensor, Tensor]]]:
    """Blocks of rows: rows, entries, (row in block, column, whether it is ours) of these, rows and columns of our labels."""
    rows, vocabulary = logits_NV.shape
    step = max(1, BLOCK_ELEMENTS // vocabulary)
    bounds = offsets[::step].tolist() if rows else []
    if rows and len(bounds) * step != rows + step:
        bounds.append(int(offsets[-1]))
    for b, start in enumerate(range(0, rows, step)):
        part = slice(start, min(start + step, rows))
        entries = slice(bounds[b], bounds[b + 1])
        count_R = offsets[part.start : part.stop + 1].diff()
        row_E = torch.arange(len(count_R), device=ids.device).repeat_interleave(count_R)
        id_E = ids[entries].to(torch.int64) - vocab_start
        mine_E = (id_E >= 0) & (id_E < vocabulary)
        if labels_N is None:
            at_L = id_L = row_E[:0]
        else:
            id_R = labels_N[part] - vocab_start
            at_L = ((labels_N[part] >= 0) & (id_R >= 0) & (id_R < vocabulary)).nonzero().squeeze(1)
            id_L = id_R[at_L]
        yield part, entries, (row_E, id_E.where(mine_E, 0), mine_E), (at_L, id_L)
