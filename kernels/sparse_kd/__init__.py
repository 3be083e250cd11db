"""`sparse_kd_loss`: logits, sparse teacher targets and labels to a scalar loss with its gradient."""

from stillroom.kernels.sparse_kd.divergence import DIVERGENCES
from stillroom.kernels.sparse_kd.loss import SparseKDOutput, sparse_kd_loss
from stillroom.kernels.sparse_kd.problem import MISSING_MASS, TargetSplit

__all__ = ["DIVERGENCES", "MISSING_MASS", "SparseKDOutput", "TargetSplit", "sparse_kd_loss"]
