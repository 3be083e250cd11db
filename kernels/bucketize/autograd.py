"""The public `bucketize` and its operators, which torch.compile takes as they are.

Shapes: `N` rows, `V` columns of the logits, `E` entries, `T` temperatures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from stillroom.kernels.backend import resolve
from stillroom.kernels.bucketize import reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Buckets:
    """What a row's loss can depend on; all float32 (float64 for float64 logits), all carry a gradient.

    Attributes:
        support_E: `[E]`, logit of every entry.
        label_N: `[N]`, logit of the label; 0 without gradient where the label is negative. None without labels.
        tail_NT: `[N, T]`, log of the sum of exp(z / T) over all ids that are neither support nor label; -inf if there are none.
    """

    support_E: Tensor
    label_N: Tensor | None
    tail_NT: Tensor


def bucketize(
    logits_NV: Tensor,
    offsets: Tensor,
    ids: Tensor,
    labels_N: Tensor | None = None,
    temperatures: Sequence[float] = (1.0,),
    impl: str = "auto",
) -> Buckets:
    """Reduce logits to what a sparse loss needs: logits at the support and the label, log-sum-exps of the rest.

    The extension point for losses of your own: everything after it is small tensors and ordinary autograd. Pad ragged
    supports with finite numbers and mask twice (`torch.where` before and after): -inf padding makes NaN gradients.
    An entry that is also the label is in both, and in no tail; its gradients add up.

    Costs three passes over the logits (two reads, one write of the gradient); saves nothing of their size but themselves.

    Args:
        logits_NV: `[N, V]` floating point, any strides.
        offsets: `[N+1]` int64, row `n` owns entries `offsets[n]:offsets[n+1]`.
        ids: `[E]` int32 or int64, unique within a row (not checked).
        labels_N: `[N]` int64; negative means none.
        temperatures: of the tails, nats are divided by them; positive.
        impl: "auto", "triton" or "reference". The Triton kernel writes -inf over the support while it sums, and puts
            the same bits back before it ends: the logits must not be read on another CUDA stream meanwhile.

    Raises:
        ValueError: an argument of the wrong shape, type, device or range. On CUDA the ids' range is not looked at, which
            would wait for the device.
    """
    check(logits_NV, offsets, ids, labels_N, temperatures)
    if not (logits_NV.is_cuda or torch.compiler.is_compiling()):
        vocabulary = logits_NV.shape[1]
        _check_range("ids", ids, 0, vocabulary)
        if labels_N is not None:
            _check_range("labels_N", labels_N, None, vocabulary)
    return buckets(logits_NV, offsets, ids, labels_N, temperatures, 0, impl)


def buckets(
    logits_NV: Tensor,
    offsets: Tensor,
    ids: Tensor,
    labels_N: Tensor | None,
    temperatures: Sequence[float],
    vocab_start: int,
    impl: str,
) -> Buckets:
    """`bucketize` for a slice of the vocabulary that begins at id `vocab_start`; ids outside it count for nothing."""
    support_E, label_N, tail_NT = _forward(
        logits_NV, offsets, ids, labels_N, [float(t) for t in temperatures], vocab_start, impl
    )
    return Buckets(support_E, None if labels_N is None else label_N, tail_NT)


def _module(impl: str, logits_NV: Tensor) -> ModuleType:
    if resolve(impl, logits_NV) == "reference":
        return reference
    from stillroom.kernels.bucketize import triton

    return triton


@torch.library.custom_op("stillroom::bucketize", mutates_args=())
def _forward(
    logits_NV: Tensor,
    offsets: Tensor,
    ids: Tensor,
    labels_N: Tensor | None,
    temperatures: Sequence[float],
    vocab_start: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = _module(impl, logits_NV).forward(
        logits_NV, offsets, ids, labels_N, temperatures, vocab_start
    )
    return found


@_forward.register_fake
def _(
    logits_NV: Tensor,
    offsets: Tensor,
    ids: Tensor,
    labels_N: Tensor | None,
    temperatures: Sequence[float],
    vocab_start: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    empty = logits_NV.new_empty
    compute, rows = reference.compute_dtype(logits_NV), logits_NV.shape[0]
    return (
        empty(ids.shape[0], dtype=compute),
        empty(rows, dtype=compute),
        empty(rows, len(temperatures), dtype=compute),
    )


@torch.library.custom_op("stillroom::bucketize_backward", mutates_args=())
def _backward(
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
    impl: str,
) -> Tensor:
    grad_NV: Tensor = _module(impl, logits_NV).backward(
        logits_NV,
        offsets,
        ids,
        labels_N,
        tail_NT,
        grad_support_E,
        grad_label_N,
        grad_tail_NT,
        temperatures,
        vocab_start,
    )
    return grad_NV


@_backward.register_fake
def _(logits_NV: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits_NV, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits_NV, offsets, ids, labels_N, ctx.temperatures, ctx.vocab_start, ctx.impl = inputs
    ctx.save_for_backward(logits_NV, offsets, ids, labels_N, output[2])


def _pull(ctx: Any, grad_support_E: Tensor, grad_label_N: Tensor, grad_tail_NT: Tensor) -> tuple[Tensor | None, ...]:
    grads = (grad_support_E, grad_label_N, grad_tail_NT)
    grad_NV = _backward(*ctx.saved_tensors, *grads, ctx.temperatures, ctx.vocab_start, ctx.impl)
    return grad_NV, None, None, None, None, None, None


_forward.register_autograd(_pull, setup_context=_save)


def check(
    logits_NV: Tensor, offsets: Tensor, ids: Tensor, labels_N: Tensor | None, temperatures: Sequence[float]
) -> None:
    """Raise ValueError for an argument whose shape, type, device or (temperatures) value cannot be used."""
    device = logits_NV.device
    if logits_NV.dim() != 2 or logits_NV.dtype not in FLOATS or logits_NV.shape[1] < 1:
        raise ValueError(
            f"`logits_NV` came as {logits_NV.dtype}{list(logits_NV.shape)}, wanted floating point [N, V]: "
            "flatten the batch with `logits.flatten(0, 1)`"
        )
    rows = logits_NV.shape[0]
    if offsets.dtype != torch.int64 or offsets.shape != (rows + 1,) or offsets.device != device:
        raise ValueError(
            f"`offsets` came as {offsets.dtype}{list(offsets.shape)} on {offsets.device}, wanted int64[{rows + 1}] on "
            f"{device}: one more than the rows of `logits_NV`"
        )
    if ids.dtype not in (torch.int32, torch.int64) or ids.dim() != 1 or ids.device != device:
        raise ValueError(
            f"`ids` came as {ids.dtype}{list(ids.shape)} on {ids.device}, wanted int32 or int64 [E] on {device}: "
            "the `ids` of SparseTargets"
        )
    if labels_N is not None and (
        labels_N.dtype != torch.int64 or labels_N.shape != (rows,) or labels_N.device != device
    ):
        raise ValueError(
            f"`labels_N` came as {labels_N.dtype}{list(labels_N.shape)} on {labels_N.device}, wanted int64[{rows}] "
            f"on {device}: one label for each row of `logits_NV`, or None"
        )
    if not len(temperatures) or not all(0 < t < math.inf for t in temperatures):
        raise ValueError(f"`temperatures` came as {tuple(temperatures)}, wanted one or more positive numbers")


def _check_range(name: str, ids: Tensor, low: int | None, vocabulary: int) -> None:
    if not ids.numel():
        return
    least, most = (int(x) for x in ids.aminmax())
    if most >= vocabulary or (low is not None and least < low):
        raise ValueError(
            f"`{name}` holds {most if most >= vocabulary else least}, wanted ids below {vocabulary}, the width of "
            "`logits_NV`: pad the student's vocabulary or use the teacher's"
        )
