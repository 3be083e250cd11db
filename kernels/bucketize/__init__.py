"""`bucketize`: logits to support logits and tail log-sum-exps, differentiable; any loss over them is a few lines of PyTorch."""

from stillroom.kernels.bucketize.autograd import Buckets, bucketize
from stillroom.kernels.bucketize.tensor_parallel import bucketize_sharded

__all__ = ["Buckets", "bucketize", "bucketize_sharded"]
