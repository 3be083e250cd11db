"""`sparse_kd_loss`: logits, sparse teacher targets and labels to a scalar loss with its gradient."""

from stillroom.kernels.sparse_kd.reference import MISSING_MASS, SparseKDOutput, sparse_kd_loss

__all__ = ["MISSING_MASS", "SparseKDOutput", "sparse_kd_loss"]
