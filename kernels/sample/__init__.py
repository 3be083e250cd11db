"""`sample`: teacher logits to sparse targets. `uniforms`: random numbers keyed by row."""

from stillroom.kernels.sample.philox import STREAM_DRAWS, STREAM_ROUNDING, uniforms
from stillroom.kernels.sample.reference import KINDS, sample

__all__ = ["KINDS", "STREAM_DRAWS", "STREAM_ROUNDING", "sample", "uniforms"]
