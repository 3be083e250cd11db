"""`dense_kd_loss`: a divergence to a teacher's whole distribution, the reference every sparse target is measured against."""

from stillroom.kernels.dense_kd.reference import LOWEST_LOGP, dense_kd_loss

__all__ = ["LOWEST_LOGP", "dense_kd_loss"]
