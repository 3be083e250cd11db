"""The sampler's public functions: on whole rows, and on rows whose vocabulary is spread over processes.

Shapes: `N` rows, `V` vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stillroom.kernels.backend import resolve
from stillroom.kernels.sample import reference, rows, steps
from stillroom.kernels.sample.checks import Request, check_arguments
from stillroom.kernels.sample.ranks import Alone, Processes
from stillroom.kernels.sample.shares import Share, TorchShare
from stillroom.kernels.sample.weights import MAX_VOCABULARY
from stillroom.kernels.targets import SparseTargets

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.no_grad()
def sample(
    logits_NV: Tensor,
    labels_N: Tensor,
    *,
    kind: str,
    draws: int,
    seed: int,
    sequence_N: Tensor,
    row_N: Tensor,
    exponent: float = 1.0,
    top_p: float = 1.0,
    impl: str = "auto",
) -> SparseTargets:
    """Sparse targets of the teacher's softmax at temperature 1.

    A row's result depends on its logits, label and (seed, sequence, row) alone, bit for bit. An id whose probability is
    below 2**-40 of the row's largest has weight 0: no sampler draws or keeps it.

    Args:
        logits_NV: `[N, V]` float32 or bfloat16, any strides; -inf is probability 0.
        labels_N: `[N]` int64, the row's label, -100 where it has none.
        kind: `threshold`, `random`, `systematic`, `stratified`, `top_k` or `top_p`; `draw.py` has the formulas.
        draws: the knob of every sampler, 1 to 4096: number of draws, threshold 1/draws, k, or cap of `top_p`.
        seed: 64-bit key.
        sequence_N: `[N]` int64, index of the row's sequence, below 2**40.
        row_N: `[N]` int64, index of the row in its sequence, below 2**24.
        exponent: proposal q ~ p**exponent of `random`; 1.0 for every other kind.
        top_p: probability mass `top_p` keeps, in (0, 1]; 1.0 for every other kind.
        impl: `auto`, `triton` or `reference`; see `kernels.backend.resolve`. On a CPU `auto` takes the compiled loops of
            `rows.py` where they were built and know the kind, and plain PyTorch for the rest. Ids, weights, offsets and
            order are the same bits for all of them. So are `logp`, `label_logp` and `entropy` on one device; a GPU's
            double-precision logarithm may differ from a CPU's in its last bit, which can show in the last bit of their
            float32.

    Returns:
        Targets with `logp`. Entries of a row: `threshold` head by weight descending, then id, then tail by id; counts by
        count descending, then id; `top_k` and `top_p` by weight descending, then id. `label_logp` is 0 where the label
        is -100 and -inf where the teacher excludes the label. For `threshold` the head is where
        `logp >= float32(-ln draws)`: rounding is settled in favour of the integer test.

    Raises:
        ValueError: an argument of the wrong shape, type, device or range; logits that are NaN, +inf or -inf throughout a
            row. On a GPU values are judged at the end, when the size of the result is read: the one wait for the device.
    """
    request = Request(labels_N, sequence_N, row_N, kind, draws, seed, exponent, top_p)
    check_arguments(logits_NV, request)
    if impl == "auto" and rows.takes(logits_NV, request):
        return rows.sample(logits_NV, request)
    if resolve(impl, logits_NV) == "reference":
        return reference.sample(logits_NV, request)
    return steps.sample(_triton_share(logits_NV, 0), request, Alone(), logits_NV.shape[1])


@torch.no_grad()
def sample_sharded(
    logits_local_NV: Tensor,
    labels_N: Tensor,
    *,
    kind: str,
    draws: int,
    seed: int,
    sequence_N: Tensor,
    row_N: Tensor,
    vocab_start: int,
    vocab_size: int,
    exponent: float = 1.0,
    top_p: float = 1.0,
    group: ProcessGroup | None = None,
    impl: str = "auto",
) -> SparseTargets:
    """`sample` where every process of a group holds a slice of the vocabulary of the same rows.

    Every process calls it with the same arguments but its logits and `vocab_start`, and gets the same targets: the
    ones `sample` gives for the whole rows, bit for bit. The slices follow each other in the order of the ranks, are of any
    sizes and any alignment, and cover the vocabulary; sums are whole numbers and so do not depend on the cut. What
    travels for each row: its maximum, two sums (two more for `threshold`), the picked ids and their logits.

    Args:
        logits_local_NV: `[N, V_local]` float32 or bfloat16, the same type everywhere, at least one column.
        labels_N: labels in the whole vocabulary.
        kind: as for `sample`, and so are all arguments that are not named here.
        draws: see `sample`.
        seed: see `sample`.
        sequence_N: see `sample`.
        row_N: see `sample`.
        vocab_start: id of the first column here.
        vocab_size: columns of all processes together, at most 2**22.
        exponent: see `sample`.
        top_p: see `sample`.
        group: the processes; None is the default group.
        impl: see `sample`.

    Returns:
        The whole targets, on every process.

    Raises:
        ValueError: as `sample`, on every process alike where the fault is in values; slices that do not follow each
            other or do not cover the vocabulary.
    """
    request = Request(labels_N, sequence_N, row_N, kind, draws, seed, exponent, top_p)
    check_arguments(logits_local_NV, request, "vocabulary slice")
    stop = vocab_start + logits_local_NV.shape[1]
    if not 0 <= vocab_start < stop <= vocab_size <= MAX_VOCABULARY:
        raise ValueError(
            f"`vocab_start` and `vocab_size` came as {vocab_start} and {vocab_size} with {logits_local_NV.shape[1]} columns, "
            f"wanted 0 <= start, start + columns <= size <= {MAX_VOCABULARY}: pass the slice this process holds"
        )
    ranks = Processes(group)
    local: Share
    if resolve(impl, logits_local_NV) == "reference":
        local = TorchShare(logits_local_NV, vocab_start)
    else:
        local = _triton_share(logits_local_NV, vocab_start)
    return steps.sample(local, request, ranks, vocab_size)


def _triton_share(logits_NV: Tensor, start: int) -> Share:
    from stillroom.kernels.sample.triton import TritonShare  # imports Triton

    return TritonShare(logits_NV, start)
