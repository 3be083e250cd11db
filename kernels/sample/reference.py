"""Samplers in plain PyTorch: teacher logits to sparse, unbiased targets. No Triton; this is also the CPU path.

`weights.py` turns logits into whole numbers, `draw.py` picks entries from them, this file puts rows together.

An id whose probability is below 2**-40 of the row's largest has weight 0: no sampler draws or keeps it.

Shapes: `N` rows, `V` vocabulary, `G` rows of a group, `E` entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from stillroom.kernels.sample import draw
from stillroom.kernels.sample.philox import STREAM_DRAWS, random_words
from stillroom.kernels.sample.weights import MAX_VOCABULARY, Weigher, Weights
from stillroom.kernels.targets import SparseTargets

KINDS: Final = ("threshold", "random", "systematic", "stratified", "top_k", "top_p")
COUNTS: Final = ("random", "systematic", "stratified")
OWN_WORDS: Final = ("random", "stratified")  # kinds with a random number for each draw
MAX_DRAWS: Final = 4096
IGNORE_LABEL: Final = -100


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
) -> SparseTargets:
    """Sparse targets of the teacher's softmax at temperature 1.

    A row's result depends on its logits, label and (seed, sequence, row) alone, bit for bit.

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

    Returns:
        Targets with `logp`. Entries of a row: `threshold` head by weight descending, then id, then tail by id; counts by
        count descending, then id; `top_k` and `top_p` by weight descending, then id. `label_logp` is 0 where the label
        is -100 and -inf where the teacher excludes the label. For `threshold` the head is where
        `logp >= float32(-ln draws)`: rounding is settled in favour of the integer test.

    Raises:
        ValueError: an argument of the wrong shape, type, device or range; logits that are NaN, +inf or -inf throughout a row.
    """
    _check(logits_NV, labels_N, kind, draws, sequence_N, row_N, exponent, top_p)
    rows, vocabulary = logits_NV.shape
    weigher = Weigher(rows, vocabulary, logits_NV.device)
    words_N = random_words(seed, sequence_N, row_N, stream=STREAM_DRAWS, count=draws if kind in OWN_WORDS else 1)
    parts: list[_Part] = []
    for start in range(0, rows, weigher.group_rows):
        group = slice(start, start + weigher.group_rows)
        logits_GV = logits_NV[group]
        top_G1 = _row_maxima(logits_GV, start)
        weights = weigher(logits_GV, top_G1)
        base = _Base(logits_GV, top_G1.squeeze(1), weights.log_partition_G(), weights.entropy_G())
        if exponent != 1.0:
            weights = weigher(logits_GV, top_G1, exponent)
        words = words_N[0][group], words_N[1][group]
        if kind == "threshold":
            picked = draw.threshold(weights, draws, words)
        elif kind in COUNTS:
            picked = draw.counts(weights, draws, words, kind)
        else:
            picked = draw.largest(weights, draws, top_p)
        picked = _in_order(picked, weights.weights_GP.shape[1])
        parts.append(_part(picked, weights, base, labels_N[group], exponent, draws if kind == "threshold" else None))
    return _join(parts, logits_NV.device)


@dataclass(frozen=True, slots=True)
class _Base:
    """What turns ids of a group into log-probabilities of the teacher."""

    logits_GV: Tensor
    top_G: Tensor
    log_partition_G: Tensor
    entropy_G: Tensor

    def logp(self, row_E: Tensor, id_E: Tensor) -> Tensor:
        """Log-probability of ids, nats, float64."""
        power_E = self.logits_GV[row_E, id_E].double() - self.top_G[row_E].double()
        return (power_E - self.log_partition_G[row_E]).clamp_max(0.0)


@dataclass(frozen=True, slots=True)
class _Part:
    """Finished targets of a group."""

    entries_G: Tensor
    id_E: Tensor
    weight_E: Tensor
    logp_E: Tensor
    label_logp_G: Tensor
    entropy_G: Tensor


def _in_order(picked: draw.Picked, place: int) -> draw.Picked:
    """Rows ascending; inside a row exact entries first, then by weight descending, then by id: one sort of one integer."""
    one = 0x3F800000  # bits of 1.0; those of positive floats are ordered as the floats
    id_bits = (place - 1).bit_length()
    late_E = picked.sampled_E << 30 | one - picked.weight_E.view(torch.int32).to(torch.int64)
    key_E, order_E = ((picked.row_E << 31 | late_E) << id_bits | picked.id_E).sort()
    return draw.Picked(
        key_E >> (31 + id_bits), key_E & ((1 << id_bits) - 1), picked.weight_E[order_E], picked.sampled_E[order_E]
    )


def _part(
    picked: draw.Picked, weights: Weights, base: _Base, labels_G: Tensor, exponent: float, threshold: int | None
) -> _Part:
    """Log-probabilities, importance weights and the row's own figures."""
    row_E, id_E = picked.row_E, picked.id_E
    logp_E, weight_E = base.logp(row_E, id_E), picked.weight_E
    if exponent != 1.0:
        proposal_E = weights.weights_GP[row_E, id_E].double() / weights.total_G[row_E].double()
        weight_E = (weight_E.double() * logp_E.exp() / proposal_E).float()
    logp_E = logp_E.float()
    if threshold is not None:
        edge = torch.tensor(-math.log(threshold), dtype=torch.float32, device=logp_E.device)
        below = torch.nextafter(edge, torch.full_like(edge, -math.inf))
        logp_E = torch.where(picked.sampled_E > 0, logp_E.minimum(below), logp_E.maximum(edge))
    rows = torch.arange(len(labels_G), device=labels_G.device)
    label_logp_G = base.logp(rows, labels_G.clamp_min(0)).masked_fill(labels_G == IGNORE_LABEL, 0.0)
    return _Part(
        entries_G=torch.bincount(row_E, minlength=len(labels_G)),
        id_E=id_E.to(torch.int32),
        weight_E=weight_E,
        logp_E=logp_E,
        label_logp_G=label_logp_G.float(),
        entropy_G=base.entropy_G.float(),
    )


def _join(parts: list[_Part], device: torch.device) -> SparseTargets:
    if not parts:
        nothing = torch.zeros(0, device=device)
        offsets = torch.zeros(1, dtype=torch.int64, device=device)
        return SparseTargets(offsets, nothing.to(torch.int32), nothing, nothing, nothing, nothing)
    entries_N = torch.cat([part.entries_G for part in parts])
    return SparseTargets(
        offsets=torch.cat((entries_N.new_zeros(1), entries_N.cumsum(0))),
        ids=torch.cat([part.id_E for part in parts]),
        weights=torch.cat([part.weight_E for part in parts]),
        label_logp=torch.cat([part.label_logp_G for part in parts]),
        entropy=torch.cat([part.entropy_G for part in parts]),
        logp=torch.cat([part.logp_E for part in parts]),
    )


def _row_maxima(logits_GV: Tensor, start: int) -> Tensor:
    top_G1 = logits_GV.amax(1, keepdim=True).float()
    if not bool(top_G1.isfinite().all()):
        row = start + int(top_G1.squeeze(1).isfinite().logical_not().nonzero()[0])
        raise ValueError(
            f"`logits_NV` row {row} holds NaN or +inf, or is -inf throughout; wanted at least one finite logit and no NaN: "
            "check the teacher's precision and the inputs of that row"
        )
    return top_G1


def _check(
    logits_NV: Tensor,
    labels_N: Tensor,
    kind: str,
    draws: int,
    sequence_N: Tensor,
    row_N: Tensor,
    exponent: float,
    top_p: float,
) -> None:
    if logits_NV.dim() != 2 or logits_NV.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"`logits_NV` came as {logits_NV.dtype}{list(logits_NV.shape)}, wanted float32 or bfloat16 [N, V]: "
            "flatten the batch and cast"
        )
    rows, vocabulary = logits_NV.shape
    if not 1 <= vocabulary <= MAX_VOCABULARY:
        raise ValueError(f"`logits_NV` has a vocabulary of {vocabulary}, wanted 1 to {MAX_VOCABULARY}")
    for name, index_N in (("labels_N", labels_N), ("sequence_N", sequence_N), ("row_N", row_N)):
        if index_N.dtype != torch.int64 or index_N.shape != (rows,) or index_N.device != logits_NV.device:
            raise ValueError(
                f"`{name}` came as {index_N.dtype}{list(index_N.shape)} on {index_N.device}, wanted int64[{rows}] "
                f"on {logits_NV.device}: one for each row of `logits_NV`"
            )
    labelled = labels_N[labels_N != IGNORE_LABEL]
    if labelled.numel() and not 0 <= int(labelled.min()) <= int(labelled.max()) < vocabulary:
        raise ValueError(
            f"`labels_N` runs from {int(labelled.min())} to {int(labelled.max())}, wanted 0 to {vocabulary - 1}, "
            f"or {IGNORE_LABEL} for a row without a label"
        )
    if kind not in KINDS:
        raise ValueError(f"`kind` came as {kind!r}: choose one of {', '.join(KINDS)}")
    if not 1 <= draws <= MAX_DRAWS:
        raise ValueError(f"`draws` came as {draws}, wanted 1 to {MAX_DRAWS}")
    if exponent != 1.0 and (kind != "random" or not 0.25 <= exponent <= 4.0):
        raise ValueError(f"`exponent` came as {exponent} with {kind!r}: only 'random' takes one, from 0.25 to 4")
    if top_p != 1.0 and (kind != "top_p" or not 0.0 < top_p <= 1.0):
        raise ValueError(f"`top_p` came as {top_p} with {kind!r}: only 'top_p' takes one, in (0, 1]")
