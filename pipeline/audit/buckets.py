"""Three partitions of the vocabulary of a row: by the teacher's probability, by its rank, by the width of the id.

Buckets of all three stand side by side, `names` says which is which. Ranks come from the probabilities at a few of them, so
that a row is sorted only as far as its 256th id.

Shapes: `N` rows, `V` vocabulary, `K` rank edges, `G` buckets, `E` entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

PROBABILITY_EDGES: Final = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
RANK_EDGES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ID_EDGES: Final = (1 << 16, 1 << 17)


@dataclass(frozen=True, slots=True)
class Partition:
    """Names of the buckets and where each partition starts."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    starts: tuple[int, int, int]


def partition(vocab_size: int) -> Partition:
    """The buckets of a vocabulary."""
    probability = ["p < 1e-05", "1e-05 to 1e-04", "1e-04 to 1e-03", "0.001 to 0.01", "0.01 to 0.1", "p >= 0.1"]
    ranks = ["rank 1", "rank 2"] + [f"ranks {low + 1} to {high}" for low, high in pairwise(RANK_EDGES[1:])]
    ranks.append(f"ranks above {RANK_EDGES[-1]}")
    edges = [0, *(edge for edge in ID_EDGES if edge < vocab_size), vocab_size]
    ids = [f"ids {low} to {high - 1}" for low, high in pairwise(edges)]
    kinds = ["probability"] * len(probability) + ["rank"] * len(ranks) + ["id"] * len(ids)
    return Partition((*probability, *ranks, *ids), tuple(kinds), (0, len(probability), len(probability) + len(ranks)))


@dataclass(frozen=True, slots=True)
class Buckets:
    """The partitions of some rows.

    Attributes:
        order_NK: ids of the 256 likeliest, most likely first (fewer where the vocabulary has fewer).
        edge_NK: log-probability at each rank edge; -inf beyond the vocabulary.
        top_NM: cumulative mass of the likeliest.
    """

    vocab_size: int
    order_NM: Tensor
    edge_NK: Tensor
    logp_NV: Tensor

    @classmethod
    def of(cls, logp_NV: Tensor) -> Buckets:
        """From the log-probabilities of the rows, float64 or float32."""
        vocab_size = logp_NV.shape[1]
        value_NM, order_NM = logp_NV.topk(min(RANK_EDGES[-1], vocab_size), dim=1)
        edges = [value_NM[:, edge - 1] if edge <= vocab_size else torch.full_like(value_NM[:, 0], -torch.inf)
                 for edge in RANK_EDGES]  # fmt: skip
        return cls(vocab_size, order_NM, torch.stack(edges, 1), logp_NV)

    def masses(self, p_NV: Tensor) -> Tensor:
        """Mass of each bucket under `p_NV`, which may be another distribution than the one that made the buckets: `[N, G]`."""
        columns, p_NV = [], p_NV.double()
        below_N = torch.zeros_like(p_NV[:, 0])
        for edge in PROBABILITY_EDGES:
            sum_N = (p_NV * (self.logp_NV < _log(edge))).sum(1)
            columns.append(sum_N - below_N)
            below_N = sum_N
        total_N = p_NV.sum(1)
        columns.append(total_N - below_N)
        cumulated_NM = p_NV.gather(1, self.order_NM).cumsum(1)
        above_N = torch.zeros_like(total_N)
        for edge in RANK_EDGES:
            sum_N = cumulated_NM[:, min(edge, self.vocab_size) - 1]
            columns.append(sum_N - above_N)
            above_N = sum_N
        columns.append((total_N - above_N).clamp_min(0))
        starts = [0, *(edge for edge in ID_EDGES if edge < self.vocab_size), self.vocab_size]
        columns += [p_NV[:, low:high].sum(1) for low, high in pairwise(starts)]
        return torch.stack(columns, 1)

    @staticmethod
    def places(logp_E: Tensor, edge_EK: Tensor, id_E: Tensor, vocab_size: int) -> Tensor:
        """Bucket of entries in each partition, `[E, 3]` int64.

        Args:
            logp_E: the teacher's log-probability of each.
            edge_EK: `edge_NK` of its row.
            id_E: the ids.
            vocab_size: V.
        """
        edges = torch.tensor([_log(edge) for edge in PROBABILITY_EDGES], dtype=logp_E.dtype, device=logp_E.device)
        probability_E = (logp_E[:, None] >= edges).sum(1)
        # 1e-9: the same log-probability, computed over other ids
        rank_E = (logp_E[:, None] < edge_EK - 1e-9).sum(1)
        starts = partition(vocab_size).starts
        width_E = torch.full_like(rank_E, starts[2])
        for edge in ID_EDGES:
            if edge < vocab_size:
                width_E += id_E >= edge
        return torch.stack([probability_E + starts[0], rank_E + starts[1], width_E], 1)


def _log(edge: float) -> float:
    return float(torch.tensor(edge, dtype=torch.float64).log())
