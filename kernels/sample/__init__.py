"""`sample`: teacher logits to sparse targets. `sample_sharded`: the same from slices of the vocabulary. `uniforms`: random
numbers keyed by row."""

from stillroom.kernels.sample.checks import KINDS
from stillroom.kernels.sample.dispatch import sample, sample_sharded
from stillroom.kernels.sample.philox import STREAM_DRAWS, STREAM_ROUNDING, uniforms

__all__ = ["KINDS", "STREAM_DRAWS", "STREAM_ROUNDING", "sample", "sample_sharded", "uniforms"]
