"""The operators beneath `fused_linear_sparse_kd`, which torch.compile takes as they are.

The loss is linear in its upstream gradient, so the gradients are made in the forward pass, where the logits are, and the backward
pass multiplies. With `recompute` nothing is kept: the backward pass makes the logits again, a fourth matrix product, and
the upstream gradient, by row if need be, goes into the row weights before anything is rounded.

Shapes: `N` rows, `V` vocabulary, `D` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stillroom.kernels.fused_linear.chunks import Wanted, run
from stillroom.kernels.fused_linear.plan import accumulator
from stillroom.kernels.fused_linear.spec import unpack


@torch.library.custom_op("stillroom::fused_linear_sparse_kd", mutates_args=())
def forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    integers: Sequence[int],
    names: str,
    dtype: torch.dtype,
    wanted: Sequence[bool],
    by_row: bool,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss (scalar or `[N]`), KD and CE by row, gradients of hidden states, weight and bias (empty if not made here)."""
    spec = unpack(tensors, numbers, integers, names, dtype)
    made = run(hidden_ND, weight_VD, bias_V, spec, Wanted(*(w and not recompute for w in wanted)))
    loss = (made.loss_N if by_row else made.loss_N.sum()).to(made.kd_N.dtype)
    return loss, made.kd_N, made.ce_N, made.hidden_ND, made.weight_VD, made.bias_V


@forward.register_fake
def _(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    integers: Sequence[int],
    names: str,
    dtype: torch.dtype,
    wanted: Sequence[bool],
    by_row: bool,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    spec = unpack(tensors, numbers, integers, names, dtype)
    compute, (rows, width), empty = accumulator(dtype), hidden_ND.shape, hidden_ND.new_empty
    hidden, weight, bias = (w and not recompute for w in wanted)
    return (
        empty((rows,) if by_row else (), dtype=compute),
        empty(rows, dtype=compute),
        empty(rows, dtype=compute),
        empty(rows if hidden else 0, width),
        empty(weight_VD.shape[0] if weight else 0, width, dtype=spec.sum_dtype(rows, weight_VD, weight)),
        empty(weight_VD.shape[0] if bias else 0, dtype=compute),
    )


@torch.library.custom_op("stillroom::fused_linear_sparse_kd_gradients", mutates_args=())
def gradients(
    upstream: Tensor,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    integers: Sequence[int],
    names: str,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias for an upstream gradient, scalar or `[N]`, in these tensors' dtypes."""
    spec = unpack(tensors, numbers, integers, names, dtype).weighted(upstream)
    made = run(hidden_ND, weight_VD, bias_V, spec, Wanted(*wanted))
    return (
        made.hidden_ND,
        made.weight_VD.to(weight_VD.dtype),
        made.bias_V.to((weight_VD if bias_V is None else bias_V).dtype),
    )


@gradients.register_fake
def _(upstream: Tensor, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, *rest: Any) -> Any:
    hidden, weight, bias = rest[-1]
    rows, width = hidden_ND.shape
    return (
        hidden_ND.new_empty(rows if hidden else 0, width),
        weight_VD.new_empty(weight_VD.shape[0] if weight else 0, width),
        (weight_VD if bias_V is None else bias_V).new_empty(weight_VD.shape[0] if bias else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_ND, weight_VD, bias_V, tensors, *ctx.packed, ctx.wanted, _, ctx.recompute = inputs
    ctx.set_materialize_grads(False)  # or zeros as large as the gradients would be made for them
    ctx.tensors = len(tensors)
    ctx.dtypes = [None if x is None else x.dtype for x in (hidden_ND, weight_VD, bias_V)]
    if ctx.recompute:
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, *tensors)
    else:
        ctx.save_for_backward(*output[3:])


def _pull(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if torch.is_grad_enabled():  # create_graph=True: the gradients would silently pass for constants
        raise RuntimeError("fused_linear_sparse_kd has no second derivative: call backward without create_graph")
    made: list[Tensor | None] = [None] * 3
    if upstream is not None:
        if ctx.recompute:
            hidden_ND, weight_VD, bias_V, *tensors = ctx.saved_tensors
            found = gradients(upstream, hidden_ND, weight_VD, bias_V, tensors, *ctx.packed, ctx.wanted)
        else:
            found = [
                x if not w else _scaled(x, upstream, t) for x, w, t in zip(ctx.saved_tensors, ctx.wanted, ctx.dtypes)
            ]
        made = [x if w else None for x, w in zip(found, ctx.wanted)]
    return *made, [None] * ctx.tensors, None, None, None, None, None, None, None


def _scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient times scalar in `dtype`; in float32 until the one rounding, and the device is not waited for.

    A scalar tensor would be rounded to the gradient's bfloat16 before it multiplies; one with dimensions is not.
    """
    out = gradient.new_empty(gradient.shape, dtype=dtype)
    return torch.mul(gradient, upstream.reshape([1] * gradient.dim()), out=out)


forward.register_autograd(_pull, setup_context=_save)
