"""Matrix products into memory that is there already, in a wider type than their factors where the device can.

Shapes: `I`, `J` rows and columns of the product, `K` the inner dimension.
"""

from __future__ import annotations

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
    elif out_IJ.is_cuda:
        torch.addmm(out_IJ, a_IK, b_KJ, out_dtype=out_IJ.dtype, beta=beta, alpha=scale, out=out_IJ)
    else:
        wide_KJ = b_KJ.to(out_IJ.dtype)
        step = max(1, BLOCK_ELEMENTS // max(1, a_IK.shape[1]))
        for start in range(0, out_IJ.shape[0], step):
            part = slice(start, start + step)
            out_IJ[part].addmm_(a_IK[part].to(out_IJ.dtype), wide_KJ, beta=beta, alpha=scale)
