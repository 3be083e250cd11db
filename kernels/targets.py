"""The torch twin of `stillroom.storage.SparseTargets`: what samplers return and losses take.

Shapes: `N` rows, `E` entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class SparseTargets:
    """Sparse next-token distributions of `N` rows in CSR form; all tensors on one device.

    Attributes:
        offsets: `[N+1]` int64, row `n` owns entries `offsets[n]:offsets[n+1]`.
        ids: `[E]` int32, unique within a row.
        weights: `[E]` float32, unbiased estimate of the teacher's probability.
        label_logp: `[N]` float32, teacher's log-probability of the label, nats.
        entropy: `[N]` float32, teacher's entropy, nats.
        logp: `[E]` float32 or None, teacher's log-probability of each id, nats.
    """

    offsets: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    label_logp: torch.Tensor
    entropy: torch.Tensor
    logp: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """Number of rows `N`."""
        return self.offsets.numel() - 1

    def entry_rows(self) -> torch.Tensor:
        """Row of every entry, `[E]` int64."""
        counts_N = self.offsets.diff()
        return torch.repeat_interleave(
            torch.arange(self.rows, device=self.offsets.device), counts_N, output_size=self.ids.numel()
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SparseTargets:
        """The same targets on another device."""

        def move(x: torch.Tensor) -> torch.Tensor:
            return x.to(device, non_blocking=non_blocking)

        return SparseTargets(
            move(self.offsets),
            move(self.ids),
            move(self.weights),
            move(self.label_logp),
            move(self.entropy),
            None if self.logp is None else move(self.logp),
        )
