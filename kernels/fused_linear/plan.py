"""How many rows of logits are made at a time, and what that costs in memory.

Shapes: `N` rows, `V` vocabulary, `D` width of the hidden states.
"""

from __future__ import annotations

from typing import Final

import torch

# Every chunk reads and writes the float32 accumulator of the weight's gradient once, 8 V D bytes, while its GEMM does 2 M V D
# operations. On an H200 (4.3 TB/s, 790 TFLOP/s) the ratio of the two times is 735 / M whatever V and D are: 0.18 at 4096
# rows, 0.36 at 2048, 2.9 at 256. From 2048 on it hides behind the GEMM; 4096 leaves room for slower memory.
CHUNK_ROWS: Final = 4096

COLUMNS: Final = 64  # a row of logits begins at a multiple of this many columns, which GEMMs of half precision want


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums over rows are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_per_chunk(rows: int, width: int, dtype: torch.dtype, chunk_rows: int | None, weight_gradient: bool) -> int:
    """Most rows of logits alive at once; `rows` itself means a single chunk.

    A `chunk_rows` that was asked for is kept to. By default half-precision logits stay in one piece up to 2 D + M rows: what they
    take more than a chunk is then no more than the float32 accumulator that a single GEMM does not need.
    """
    limit = chunk_rows or CHUNK_ROWS
    if chunk_rows is None and weight_gradient and dtype.itemsize == 2 and rows <= 2 * width + limit:
        return rows
    return min(rows, limit)


def peak_bytes(
    rows: int,
    vocabulary: int,
    width: int,
    dtype: torch.dtype,
    *,
    chunk_rows: int | None = None,
    hidden_gradient: bool = True,
    weight_gradient: bool = True,
    softcap: bool = False,
    recompute: bool = False,
) -> int:
    """Largest memory of the forward pass beyond its arguments, in bytes, to within the loss kernel's few megabytes.

    The chunk of logits, which becomes their gradient in place (a soft-cap needs the logits before it, too); the weight's
    gradient, in float32 where it is added up over chunks; the hidden states' gradient. With `recompute` the gradients
    are made in the backward pass and so is this peak; forward then takes the chunk alone. Backward multiplies by the
    upstream gradient into new memory: at most the gradients once more, the chunk being gone by then.
    """
    rows_at_once = rows_per_chunk(rows, width, dtype, chunk_rows, weight_gradient)
    columns = -(-vocabulary // COLUMNS) * COLUMNS
    total = rows_at_once * columns * dtype.itemsize * (2 if softcap else 1)
    if hidden_gradient:
        total += rows * width * dtype.itemsize
    if weight_gradient:
        summed = accumulator(dtype) if rows_at_once < rows else dtype
        total += vocabulary * width * (summed.itemsize + (dtype.itemsize if recompute and summed != dtype else 0))
    return total
