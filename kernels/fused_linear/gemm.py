"""Matrix products into memory that is there already, in a wider type than their factors where the device can.

Shapes: `I`, `J` rows and columns of the product, `K` the inner dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Final

import torch
from torch import Tensor

BLOCK_ELEMENTS: Final = 1 << 22  # of a factor widened at a time: 16 MiB of float32


def multiply_into(out_IJ: Tensor, a_IK: Tensor, b_KJ: Tensor, *, scale: float = 1.0, add: bool = False) -> None:
    """out = scale * a @ b, or with `add` out += scale * a @ b.

    `out_IJ` is of the factors' dtype or, for half-precision factors, float32. On CUDA the GEMM itself then writes float32.
    A CPU has no such GEMM: a block of rows of `a_IK` at a time is widened, and `b_KJ` at once.
    """
    beta = 1.0 if add else 0.0  # with 0 what stands in `out` does not matter, NaN included
    if out_IJ.dtype == a_IK.dtype:
        torch.addmm(out_IJ, a_IK, b_KJ, beta=beta, alpha=scale, out=out_IJ)
    elif not out_IJ.is_cuda:
        wide_KJ = b_KJ.to(out_IJ.dtype)
        for part in _blocks(out_IJ.shape[0], a_IK.shape[1]):
            out_IJ[part].addmm_(a_IK[part].to(out_IJ.dtype), wide_KJ, beta=beta, alpha=scale)
    elif _adds_to_wide(out_IJ.device):
        torch.addmm(out_IJ, a_IK, b_KJ, out_dtype=out_IJ.dtype, beta=beta, alpha=scale, out=out_IJ)
    else:
        for part in _blocks(out_IJ.shape[0], b_KJ.shape[1]):
            product = torch.mm(a_IK[part], b_KJ, out_dtype=out_IJ.dtype)
            out_IJ[part] = torch.add(out_IJ[part], product, alpha=scale) if add else product.mul_(scale)


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, start + step)


@cache
def _adds_to_wide(device: torch.device) -> bool:
    """Whether this PyTorch adds a product of half-precision factors to a float32 matrix; 2.9 makes such products only."""
    a = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    out = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
    except RuntimeError as error:
        if "dtype" not in str(error):
            raise
        return False
    return True
