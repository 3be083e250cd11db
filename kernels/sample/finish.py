"""From picked entries to `SparseTargets`: their order, log-probabilities and importance weights.

Shapes: `G` rows, `E` entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.kernels.sample.checks import IGNORE_LABEL
from stillroom.kernels.sample.draw import Picked
from stillroom.kernels.sample.weights import LOG2E, UNIT
from stillroom.kernels.targets import SparseTargets


@dataclass(frozen=True, slots=True)
class Rows:
    """What turns logits into log-probabilities of the teacher: its whole-number sums, see `Weights`."""

    top_G: Tensor
    total_G: Tensor
    moment_G: Tensor

    def log_partition(self) -> Tensor:
        """Log of the sum of exp(t / log2(e)), nats, `[G]` float64: log p = z - row maximum - this."""
        return (self.total_G.double() / UNIT).log()

    def entropy(self) -> Tensor:
        """Entropy, nats, `[G]` float64."""
        return (self.log_partition() + self.moment_G.double() / self.total_G.double() / LOG2E).clamp_min(0.0)

    def logp(self, row_E: Tensor, logits_E: Tensor, log_partition_G: Tensor) -> Tensor:
        """Log-probability of entries, nats, float64."""
        power_E = logits_E.double() - self.top_G[row_E].double()
        return (power_E - log_partition_G[row_E]).clamp_max(0.0)


def in_order(picked: Picked, id_bits: int, rows: int) -> tuple[Picked, Tensor]:
    """Rows ascending; inside a row exact entries first, then by weight descending, then by id: one sort of one integer.

    Args:
        picked: entries in any order.
        id_bits: every id is below `2**id_bits`, at most 22.
        rows: every row is below it.

    Returns:
        The entries in order, and where each was before.
    """
    one = 0x3F800000  # bits of 1.0; those of positive floats are ordered as the floats
    late_E = picked.sampled_E << 30 | one - picked.weight_E.view(torch.int32).to(torch.int64)
    if rows.bit_length() + 31 + id_bits <= 63:
        key_E, order_E = ((picked.row_E << 31 | late_E) << id_bits | picked.id_E).sort()
        id_E, row_E = key_E & ((1 << id_bits) - 1), key_E >> (31 + id_bits)
    else:  # too many rows for one integer
        order_E = (late_E << id_bits | picked.id_E).argsort()
        order_E = order_E[picked.row_E[order_E].argsort(stable=True)]
        id_E, row_E = picked.id_E[order_E], picked.row_E[order_E]
    return Picked(row_E, id_E, picked.weight_E[order_E], picked.sampled_E[order_E]), order_E


def finish(
    picked: Picked,
    logits_E: Tensor,
    proposal_E: Tensor | None,
    rows: Rows,
    labels_G: Tensor,
    label_logits_G: Tensor,
    threshold: int | None,
) -> SparseTargets:
    """Targets of entries that are in order.

    Args:
        picked: of `in_order`.
        logits_E: logit of every entry.
        proposal_E: float64 probability each was drawn with, where that is not the teacher's.
        rows: sums of the rows.
        labels_G: -100 for none.
        label_logits_G: logit of every label, anything where there is none.
        threshold: N of the kind `threshold`, whose head is where `logp >= float32(-ln N)`.
    """
    row_E, weight_E = picked.row_E, picked.weight_E
    row_G = torch.arange(len(labels_G), device=labels_G.device)
    log_partition_G = rows.log_partition()
    logp_E = rows.logp(row_E, logits_E, log_partition_G)
    if proposal_E is not None:
        weight_E = (weight_E.double() * logp_E.exp() / proposal_E).float()
    logp_E = logp_E.float()
    if threshold is not None:
        edge = torch.tensor(-math.log(threshold), dtype=torch.float32)
        below = float(torch.nextafter(edge, torch.tensor(-math.inf)))
        logp_E = torch.where(picked.sampled_E > 0, logp_E.clamp_max(below), logp_E.clamp_min(float(edge)))
    label_logp_G = rows.logp(row_G, label_logits_G, log_partition_G)
    return SparseTargets(
        offsets=torch.searchsorted(row_E, torch.arange(len(labels_G) + 1, device=row_E.device)),
        ids=picked.id_E.to(torch.int32),
        weights=weight_E,
        logp=logp_E,
        label_logp=label_logp_G.masked_fill(labels_G == IGNORE_LABEL, 0.0).float(),
        entropy=rows.entropy().float(),
    )


def join(parts: Sequence[SparseTargets], device: torch.device) -> SparseTargets:
    """Rows one after another; none give empty targets."""
    if not parts:
        nothing = torch.zeros(0, device=device)
        offsets = torch.zeros(1, dtype=torch.int64, device=device)
        return SparseTargets(offsets, nothing.to(torch.int32), nothing, nothing, nothing, nothing)
    if len(parts) == 1:
        return parts[0]
    entries_N = torch.cat([part.offsets.diff() for part in parts])
    return SparseTargets(
        offsets=torch.cat((entries_N.new_zeros(1), entries_N.cumsum(0))),
        ids=torch.cat([part.ids for part in parts]),
        weights=torch.cat([part.weights for part in parts]),
        label_logp=torch.cat([part.label_logp for part in parts]),
        entropy=torch.cat([part.entropy for part in parts]),
        logp=torch.cat([part.logp for part in parts if part.logp is not None]),
    )
