"""`Spec`: everything about a fused loss but hidden states, weight and bias, and how it passes through an operator.

Operators of torch.library take tensors, numbers and strings. So a Spec is packed into four flat arguments on one side and
unpacked on the other, in this file and nowhere else.

Shapes: `N` rows, `E` entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stillroom.kernels.fused_linear.plan import accumulator, rows_per_chunk
from stillroom.kernels.sparse_kd.problem import Problem, TargetSplit
from stillroom.kernels.targets import SparseTargets

Packed = tuple[list[Tensor], list[float], list[int], str, torch.dtype]


@dataclass(frozen=True)
class Spec:
    """A fused loss.

    Attributes:
        problem: the loss of the logits.
        logit_scale: factor of the logits.
        softcap: their soft limit after the factor, or None.
        vocabulary: how many of the weight's rows are ids; the rest is padding.
        chunk_rows: most rows of logits at a time, None for the default.
        compact: whether rows of weight 0 are left out of the matrix products.
        impl: of the loss.
        dtype: of the matrix products' factors.
    """

    problem: Problem
    logit_scale: float
    softcap: float | None
    vocabulary: int
    chunk_rows: int | None
    compact: bool
    impl: str
    dtype: torch.dtype

    def sum_dtype(self, rows: int, weight_VD: Tensor, wanted: bool) -> torch.dtype:
        """The type of the weight's gradient as it is made: a wide one where it is added up over chunks."""
        one_chunk = rows_per_chunk(rows, weight_VD.shape[1], self.dtype, self.chunk_rows, wanted) >= rows
        return self.dtype if one_chunk and weight_VD.dtype == self.dtype else accumulator(self.dtype)

    def weighted(self, upstream: Tensor) -> Spec:
        """The same with row weights times a scalar or `[N]`."""
        weight_N = self.problem.weight_N * upstream.to(self.problem.weight_N.dtype)
        return replace(self, problem=replace(self.problem, weight_N=weight_N))

    def pack(self) -> Packed:
        """Tensors, numbers, integers, names and dtype."""
        p, t, s = self.problem, self.problem.targets, self.problem.split
        tensors = [p.labels_N, p.weight_N]
        if t is not None:
            tensors += [t.offsets, t.ids, t.weights, t.label_logp, t.entropy]
            tensors += [] if t.logp is None else [t.logp]
        if s is not None:
            tensors += [s.tkd_N, s.dkd_N]
        cap = 0.0 if self.softcap is None else float(self.softcap)
        numbers = [float(p.alpha), float(p.parameter), float(p.temperature), float(self.logit_scale), cap]
        present = [t is not None, t is not None and t.logp is not None, s is not None]
        integers = [self.vocabulary, self.chunk_rows or 0, int(self.compact), *map(int, present)]
        return tensors, numbers, integers, f"{p.divergence} {p.missing} {self.impl}", self.dtype


def unpack(
    tensors: Sequence[Tensor], numbers: Sequence[float], integers: Sequence[int], names: str, dtype: torch.dtype
) -> Spec:
    """The Spec that was packed."""
    labels_N, weight_N, *rest = tensors
    vocabulary, chunk_rows, compact, has_targets, has_logp, has_split = integers
    targets = split = None
    if has_targets:
        offsets, ids, weights, label_logp, entropy, *rest = rest
        logp = rest.pop(0) if has_logp else None
        targets = SparseTargets(offsets, ids, weights, label_logp, entropy, logp)
    if has_split:
        split = TargetSplit(*rest)
    alpha, parameter, temperature, logit_scale, cap = numbers
    divergence, missing, impl = names.split(" ")
    return Spec(
        Problem(targets, labels_N, weight_N, alpha, divergence, parameter, temperature, missing, split),
        logit_scale,
        cap or None,
        vocabulary,
        chunk_rows or None,
        bool(compact),
        impl,
        dtype,
    )
