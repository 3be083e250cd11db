"""Buckets of a row and their gradient as two streaming kernels, one program per row.

Forward reads the logits once. It first writes -inf at the row's support and label, so that the stream sums exactly the
tail, and puts the same bits back before it ends. Backward reads them once and writes the gradient once: 6 bytes per
bfloat16 logit in all.

Shapes: `N` rows, `V` columns of the logits, `E` entries, `T` temperatures. Kernel parameters in capitals are pointers or
compile-time constants.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from stillroom.kernels.backend import interpreted

# The interpreter truncates float32 to bfloat16; the kernels then round to nearest even by hand.
INTERPRETED: Final = interpreted()
# Columns in work at a time, over all temperatures. Derived, not measured on a GPU yet: 16 elements per thread of 16 warps compile
# to at most 40 registers on sm_90 without spills, so four programs share a multiprocessor.
BLOCK: Final = 8192
ENTRY_BLOCK: Final = 64


@triton.jit  # type: ignore[untyped-decorator]
def _round(x, dtype: tl.constexpr, EMULATE: tl.constexpr):  # type: ignore[no-untyped-def]
    if EMULATE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True).to(dtype)
    else:
        return x.to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _forward_kernel(  # type: ignore[no-untyped-def]
    LOGITS, stride, OFFSETS, IDS, LABELS, INVERSE_T, SUPPORT, LABEL_LOGIT, TAIL, columns, vocab_start, temperatures,
    HAS_LABELS: tl.constexpr, T: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # N * V may pass 2**31
    LOGITS += row * stride
    stored = LOGITS.dtype.element_ty
    first, last = tl.load(OFFSETS + row), tl.load(OFFSETS + row + 1)
    k = tl.arange(0, K)
    y = tl.zeros((), tl.int64)
    has_y = False
    z_y = tl.zeros((), tl.float32)
    if HAS_LABELS:
        label = tl.load(LABELS + row)
        y = label - vocab_start
        has_y = (label >= 0) & (y >= 0) & (y < columns)
        z_y = tl.load(LOGITS + y, mask=has_y, other=0.0).to(tl.float32)
        tl.store(LABEL_LOGIT + row, z_y)
    for start in range(first, last, K):
        entry = start + k
        column = tl.load(IDS + entry, mask=entry < last, other=0).to(tl.int64) - vocab_start
        mine = (entry < last) & (column >= 0) & (column < columns)
        z = tl.load(LOGITS + column, mask=mine, other=0.0).to(tl.float32)
        tl.store(SUPPORT + entry, z, mask=entry < last)
    tl.debug_barrier()
    hole = tl.full((K,), float("-inf"), tl.float32).to(stored)
    for start in range(first, last, K):
        entry = start + k
        column = tl.load(IDS + entry, mask=entry < last, other=0).to(tl.int64) - vocab_start
        tl.store(LOGITS + column, hole, mask=(entry < last) & (column >= 0) & (column < columns))
    if HAS_LABELS:
        tl.store(LOGITS + y, tl.full((), float("-inf"), tl.float32).to(stored), mask=has_y)
    tl.debug_barrier()

    t = tl.arange(0, T)
    inverse_t = tl.load(INVERSE_T + t, mask=t < temperatures, other=1.0)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((T,), tl.float32)
    for start in range(0, columns, BLOCK):
        j = start + tl.arange(0, BLOCK)
        z = tl.load(LOGITS + j, mask=j < columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(z, 0))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # -inf minus -inf is NaN
        total = total * tl.exp((top - level) * inverse_t)
        total += tl.sum(tl.exp((z - level)[None, :] * inverse_t[:, None]), 1)
        top = higher
    some = total > 0
    tail = tl.where(some, tl.where(some, top, 0.0) * inverse_t + tl.log(tl.where(some, total, 1.0)), float("-inf"))
    tl.store(TAIL + row * temperatures + t, tail, mask=t < temperatures)

    tl.debug_barrier()
    for start in range(first, last, K):
        entry = start + k
        column = tl.load(IDS + entry, mask=entry < last, other=0).to(tl.int64) - vocab_start
        z = tl.load(SUPPORT + entry, mask=entry < last, other=0.0)  # came from `stored`, goes back exactly
        tl.store(LOGITS + column, z.to(stored), mask=(entry < last) & (column >= 0) & (column < columns))
    if HAS_LABELS:
        tl.store(LOGITS + y, z_y.to(stored), mask=has_y)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_kernel(  # type: ignore[no-untyped-def]
    LOGITS, stride, OFFSETS, IDS, LABELS, INVERSE_T, TAIL, GRAD_SUPPORT, GRAD_LABEL, GRAD_TAIL, GRAD, columns,
    vocab_start, temperatures, HAS_LABELS: tl.constexpr, T: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * stride
    GRAD += row * columns
    stored = GRAD.dtype.element_ty
    t = tl.arange(0, T)
    inverse_t = tl.load(INVERSE_T + t, mask=t < temperatures, other=1.0)
    tail = tl.load(TAIL + row * temperatures + t, mask=t < temperatures, other=float("-inf"))
    filled = tail > float("-inf")  # an empty tail is a constant, whatever gradient arrives there
    pull = tl.where(filled, tl.load(GRAD_TAIL + row * temperatures + t, mask=filled, other=0.0) * inverse_t, 0.0)
    tail = tl.where(filled, tail, 0.0)
    for start in range(0, columns, BLOCK):
        j = start + tl.arange(0, BLOCK)
        z = tl.load(LOGITS + j, mask=j < columns, other=float("-inf")).to(tl.float32)
        power = tl.minimum(z[None, :] * inverse_t[:, None] - tail[:, None], 0.0)  # only the support can be above
        grad = tl.sum(tl.exp(power) * pull[:, None], 0)
        tl.store(GRAD + j, _round(grad, stored, EMULATE), mask=j < columns)

    tl.debug_barrier()
    first, last = tl.load(OFFSETS + row), tl.load(OFFSETS + row + 1)
    k = tl.arange(0, K)
    y = tl.zeros((), tl.int64)
    has_y = False
    grad_y = tl.zeros((), tl.float32)
    if HAS_LABELS:
        label = tl.load(LABELS + row)
        y = label - vocab_start
        has_y = (label >= 0) & (y >= 0) & (y < columns)
        grad_y = tl.load(GRAD_LABEL + row)
    for start in range(first, last, K):
        entry = start + k
        column = tl.load(IDS + entry, mask=entry < last, other=0).to(tl.int64) - vocab_start
        mine = (entry < last) & (column >= 0) & (column < columns)
        grad = tl.load(GRAD_SUPPORT + entry, mask=mine, other=0.0)
        tl.store(GRAD + column, _round(grad, stored, EMULATE), mask=mine)
        grad_y += tl.sum(
            tl.where(mine & (column == y), grad, 0.0), 0
        )  # the label is an entry too: added before rounding
    if HAS_LABELS:
        tl.debug_barrier()
        tl.store(GRAD + y, _round(grad_y, stored, EMULATE), mask=has_y)


def forward(
    logits_NV: Tensor, offsets: Tensor, ids: Tensor, labels_N: Tensor | None, temperatures: Sequence[float], vocab_start: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `reference.forward`."""
    logits_NV = _rows_apart(logits_NV)
    rows, columns = logits_NV.shape
    support_E = logits_NV.new_empty(len(ids), dtype=torch.float32)
    label_N = logits_NV.new_zeros(rows, dtype=torch.float32)
    tail_NT = logits_NV.new_empty(rows, len(temperatures), dtype=torch.float32)
    if rows:
        with _on(logits_NV):
            _forward_kernel[(rows,)](
                logits_NV, logits_NV.stride(0), *_dense(offsets, ids, labels_N), _inverse(temperatures, logits_NV), support_E,
                label_N, tail_NT, columns, vocab_start, len(temperatures), HAS_LABELS=labels_N is not None,
                **_launch(columns, len(ids) / rows, len(temperatures)),
            )  # fmt: skip
    return support_E, label_N, tail_NT


def backward(
    logits_NV: Tensor, offsets: Tensor, ids: Tensor, labels_N: Tensor | None, tail_NT: Tensor, grad_support_E: Tensor,
    grad_label_N: Tensor, grad_tail_NT: Tensor, temperatures: Sequence[float], vocab_start: int,
) -> Tensor:  # fmt: skip
    """As `reference.backward`."""
    logits_NV = _rows_apart(logits_NV)
    rows, columns = logits_NV.shape
    grad_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
    if rows:
        with _on(logits_NV):
            _backward_kernel[(rows,)](
                logits_NV, logits_NV.stride(0), *_dense(offsets, ids, labels_N), _inverse(temperatures, logits_NV),
                *_dense(tail_NT, grad_support_E, grad_label_N, grad_tail_NT), grad_NV, columns, vocab_start,
                len(temperatures), HAS_LABELS=labels_N is not None,
                EMULATE=INTERPRETED and grad_NV.dtype == torch.bfloat16,
                **_launch(columns, len(ids) / rows, len(temperatures)),
            )  # fmt: skip
    return grad_NV


def _rows_apart(logits_NV: Tensor) -> Tensor:
    """Columns next to each other and no two rows in the same memory, which holes would be punched in twice."""
    if logits_NV.stride(1) == 1 and logits_NV.stride(0) >= logits_NV.shape[1]:
        return logits_NV
    return logits_NV.contiguous()


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous: the kernels know no strides but the logits'."""
    return [None if x is None else x.contiguous() for x in tensors]


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the tensors are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _inverse(temperatures: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor([1.0 / t for t in temperatures], dtype=torch.float32).to(like.device, non_blocking=True)


def _launch(columns: int, entries: float, temperatures: int) -> dict[str, Any]:
    lanes = triton.next_power_of_2(temperatures)
    block = min(triton.next_power_of_2(columns), max(128, BLOCK // lanes))
    return dict(
        T=lanes,
        K=min(ENTRY_BLOCK, triton.next_power_of_2(max(1, round(entries)))),
        BLOCK=block,
        num_warps=max(4, min(16, block * lanes // 512)),
    )
