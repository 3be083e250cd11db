"""`fused_linear_sparse_kd`: the public function and the checks of its arguments.

Shapes: `N` rows, `V` vocabulary, `D` width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stillroom.kernels.backend import IMPLEMENTATIONS
from stillroom.kernels.fused_linear import autograd
from stillroom.kernels.fused_linear.spec import Spec
from stillroom.kernels.sparse_kd.loss import SparseKDOutput
from stillroom.kernels.sparse_kd.problem import TargetSplit, make_problem
from stillroom.kernels.targets import SparseTargets

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fused_linear_sparse_kd(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets: SparseTargets | None,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    recompute: bool = False,
    compact: bool = True,
    alpha: float = 0.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    temperature: float = 1.0,
    missing: str = "truncate",
    row_weights_N: Tensor | None = None,
    reduction: str = "sum",
    split: TargetSplit | None = None,
    impl: str = "auto",
    check: bool | None = None,
) -> SparseKDOutput:
    """`sparse_kd_loss` of a head's logits, of which no more than a chunk exists at any time.

    The logits are logit_scale * (hidden @ weight.T + bias), then, with a soft-cap, softcap * tanh(logits / softcap).
    Gradients of hidden states, weight and bias are made in the forward pass (three matrix products in all) and kept until the
    backward pass; `plan.peak_bytes` says what that takes. Only those that are required are made.

    Call it inside the forward of a module wrapped in DDP or FSDP, where the head's weight is a plain tensor, and return
    tensors from there (`out.loss`, not `out`: the wrappers look for tensors to hook into).

    Args:
        hidden_ND: `[N, D]` float32, bfloat16, float16 or float64. Under autocast any of them; products are then of its dtype.
        weight_VD: `[V, D]`, the head; its dtype too may differ under autocast alone. Its gradient is summed over chunks in
            float32 whatever the dtypes are.
        targets: of the same rows, see `sparse_kd_loss`.
        labels_N: `[N]` int64; -100 ignores the row.
        bias_V: `[V]` of the head.
        logit_scale: factor of the logits, as some models have it.
        softcap: soft limit of the logits, as some models have it. Costs a second chunk of logits.
        vocab_size: number of ids if the head is padded: rows of the weight from there on are no ids, get no probability and
            no gradient, and cost nothing.
        chunk_rows: most rows of logits at a time. Default: 4096, or all rows at once where that takes no more memory than the
            accumulator it saves, see `plan.rows_per_chunk`.
        recompute: keep nothing but the arguments and make the gradients in the backward pass: a fourth matrix product.
        compact: leave rows without weight (label -100, row weight 0) out of all products. The host then waits for the device
            to learn how many are left; False for CUDA graphs.
        alpha: this and the following as in `sparse_kd_loss`.
        divergence: see there.
        beta: see there.
        skew: see there.
        temperature: see there.
        missing: see there.
        row_weights_N: see there.
        reduction: `sum`, or `none`, which needs `recompute`: gradients of a sum cannot be taken apart again.
        split: see there.
        impl: of the loss: `auto`, `triton` or `reference`. Matrix products are PyTorch's.
        check: see there.

    Returns:
        Loss, and KD and CE by row.

    Raises:
        ValueError: an argument of the wrong shape, type, device or range.
    """
    _check(hidden_ND, weight_VD, bias_V, labels_N, logit_scale, softcap, vocab_size, chunk_rows, impl)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden_ND, weight_VD, bias_V)]
    if reduction == "none" and any(wanted) and not recompute:
        raise ValueError(
            "`reduction` came as 'none' with recompute=False, wanted 'sum', or recompute=True: gradients made in the forward "
            "pass are those of the sum and cannot be weighted by row afterwards"
        )
    vocabulary = weight_VD.shape[0] if vocab_size is None else vocab_size
    dtype = _product_dtype(hidden_ND, weight_VD, bias_V)
    problem = make_problem(
        targets,
        labels_N,
        vocabulary=vocabulary,
        dtype=dtype,
        device=hidden_ND.device,
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
    spec = Spec(problem, logit_scale, softcap, vocabulary, chunk_rows, compact, impl, dtype)
    loss, kd_N, ce_N, *_ = autograd.forward(
        hidden_ND, weight_VD, bias_V, *spec.pack(), wanted, reduction == "none", recompute
    )
    return SparseKDOutput(loss, kd_N.detach(), ce_N.detach())


def _product_dtype(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> torch.dtype:
    kind = hidden_ND.device.type
    if torch.is_autocast_enabled(kind) and hidden_ND.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    for name, given in (("weight_VD", weight_VD), ("bias_V", bias_V)):
        if given is not None and given.dtype != hidden_ND.dtype:
            raise ValueError(
                f"`{name}` came as {given.dtype} with hidden states of {hidden_ND.dtype}, wanted the same: cast one, or call "
                "under torch.autocast, which chooses the type of the products"
            )
    return hidden_ND.dtype


def _check(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    logit_scale: float,
    softcap: float | None,
    vocab_size: int | None,
    chunk_rows: int | None,
    impl: str,
) -> None:
    if hidden_ND.dim() != 2 or hidden_ND.dtype not in FLOATS:
        raise ValueError(
            f"`hidden_ND` came as {hidden_ND.dtype}{list(hidden_ND.shape)}, wanted floating point [N, D]: flatten the "
            "batch with `hidden.flatten(0, 1)`"
        )
    rows, width = hidden_ND.shape
    if hasattr(weight_VD, "device_mesh"):
        raise ValueError(
            "`weight_VD` came as a DTensor, wanted a plain tensor: call the loss inside the forward of the module that "
            "fully_shard wrapped, where the weight is whole, or pass `weight.full_tensor()`"
        )
    if (
        weight_VD.dim() != 2
        or weight_VD.shape[0] < 1
        or weight_VD.shape[1] != width
        or weight_VD.dtype not in FLOATS
        or weight_VD.device != hidden_ND.device
    ):
        raise ValueError(
            f"`weight_VD` came as {weight_VD.dtype}{list(weight_VD.shape)} on {weight_VD.device}, wanted floating point "
            f"[V, {width}] on {hidden_ND.device}: the `weight` of the head's nn.Linear"
        )
    vocabulary = weight_VD.shape[0]
    if bias_V is not None and (bias_V.shape != (vocabulary,) or bias_V.device != hidden_ND.device):
        raise ValueError(
            f"`bias_V` came as {list(bias_V.shape)} on {bias_V.device}, wanted [{vocabulary}] on {hidden_ND.device}: one "
            "number for each row of `weight_VD`"
        )
    if labels_N.numel() != rows:
        raise ValueError(
            f"`labels_N` came with {labels_N.numel()} labels, wanted {rows}: one for each row of `hidden_ND`"
        )
    if not 0.0 < abs(logit_scale) < math.inf:
        raise ValueError(f"`logit_scale` came as {logit_scale}, wanted a number other than 0; 1 changes nothing")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"`softcap` came as {softcap}, wanted a positive number, or None for no cap")
    if vocab_size is not None and not 1 <= vocab_size <= vocabulary:
        raise ValueError(f"`vocab_size` came as {vocab_size}, wanted 1 to {vocabulary}, the rows of `weight_VD`")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"`chunk_rows` came as {chunk_rows}, wanted 1 or more, or None for the default")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"`impl` came as {impl!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
