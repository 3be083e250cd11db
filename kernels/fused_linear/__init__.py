"""`fused_linear_sparse_kd`: hidden states and the head's weight to the distillation loss, a chunk of logits at a time."""

from stillroom.kernels.fused_linear.loss import fused_linear_sparse_kd
from stillroom.kernels.fused_linear.plan import CHUNK_ROWS, peak_bytes

__all__ = ["CHUNK_ROWS", "fused_linear_sparse_kd", "peak_bytes"]
