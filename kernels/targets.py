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


def tempered(targets: SparseTargets, temperature: float) -> SparseTargets:
    """The targets of the teacher's distribution at another temperature, p_T(j) = p_j**(1/T) / Z, made from those at T = 1.

    With weights w that estimate p, sum_j w_j p_j**(1/T - 1) f(j) estimates sum_j p_j**(1/T) f(j) without bias, but Z is not
    known. The same sum with f = 1 stands in for it (self-normalised importance weights), so that

        Z = sum_j w_j p_j**(1/T - 1),      w_T = w p**(1/T - 1) / Z,      log p_T = log p / T - log Z

    and a row sums to 1. The quotient of two estimates is biased by O(1/N) in the number of draws N: exact where the target
    holds the whole distribution, and at T = 1 up to the normalisation. Mass that a top-k target lacks has no known
    temperature and is left out, as with `missing="renormalise_teacher"`. The weights' variance grows with T, since a rare
    id that was drawn gains p**(1/T - 1).

    Args:
        targets: at T = 1, with `logp` of every entry.
        temperature: T, positive.

    Returns:
        Targets with the same ids; `label_logp` and `entropy` are those of p_T by the same estimate.

    Raises:
        ValueError: targets without log-probabilities, or a temperature that is none.
    """
    if targets.logp is None:
        raise ValueError(
            "`targets` came without `logp`, wanted the teacher's log-probability of every entry: counts alone cannot be "
            "brought to another temperature"
        )
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"`temperature` came as {temperature}, wanted a positive number; 1 changes nothing")
    row_E, logp_E = targets.entry_rows(), targets.logp.double()
    power_E = targets.weights.double() * (logp_E * (1.0 / temperature - 1.0)).exp()
    power_E = torch.where(targets.weights > 0, power_E, 0.0)  # 0 times infinity, where p is 0, too
    none_N = power_E.new_zeros(targets.rows)
    z_N = none_N.index_add(0, row_E, power_E)
    log_z_N = torch.where(z_N > 0, z_N, 1.0).log()
    weight_E = power_E / torch.where(z_N > 0, z_N, 1.0)[row_E]
    logp_E = logp_E / temperature - log_z_N[row_E]
    surprise_E = torch.where(weight_E > 0, -weight_E * logp_E, 0.0)
    return SparseTargets(
        targets.offsets,
        targets.ids,
        weight_E.float(),
        (targets.label_logp.double() / temperature - log_z_N).clamp_max(0.0).float(),
        none_N.index_add(0, row_E, surprise_E).float(),
        logp_E.float(),
    )
