"""Synthetic teacher rows whose sizes resemble a real teacher's, with no model in sight.

A position has one of a few hundred context shapes (a rank -> probability curve, a Zipf law with a confident first rank) and a
rank -> id map, recurring for 30 % of positions and fresh for the others; ids follow a Zipf unigram whose numbering is
only roughly by frequency, as in a BPE vocabulary. 50 draws find about 12.25 distinct ids.

Shapes: `R` rows, `E` entries, `V` vocabulary, `K` contexts, `Q` ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from stillroom.storage.spec import SamplerSpec
from stillroom.storage.targets import SparseTargets

Array = npt.NDArray[Any]
CONTEXTS, RANKS, SHARED = 384, 4096, 0.3


@dataclass(frozen=True)
class Position:
    """What decides the distributions of a run of rows: their context, map key and whether the map recurs."""

    context_R: Array
    key_R: Array
    shared_R: Array


@dataclass
class SyntheticTeacher:
    """Draws sequences of teacher targets.

    Attributes:
        vocab_size: number of ids.
        seed: of everything.
    """

    vocab_size: int = 128_256
    seed: int = 0
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = rng = np.random.default_rng(self.seed)
        rank_V = np.arange(1, self.vocab_size + 1)
        # Ids are by frequency, but for one nat of noise in log rank.
        order_V = np.argsort(np.log(rank_V) + rng.normal(0, 1.0, self.vocab_size))
        self.id_of_rank_V = np.empty(self.vocab_size, np.int64)
        self.id_of_rank_V[order_V] = np.arange(self.vocab_size)
        unigram_V = np.cumsum((rank_V + 2.7) ** -1.05)
        self.unigram_cdf_V = unigram_V / unigram_V[-1]
        slope_K, shift_K = rng.uniform(0.95, 2.9, CONTEXTS), rng.exponential(1.2, CONTEXTS)
        top_K = rng.beta(0.9, 1.4, CONTEXTS)
        curve_KQ = (np.arange(1, RANKS + 1) + shift_K[:, None]) ** -slope_K[:, None]
        curve_KQ *= (1 - top_K)[:, None] / curve_KQ.sum(1, keepdims=True)
        curve_KQ[:, 0] += top_K
        self.p_KQ = curve_KQ
        self.cdf_KQ = np.cumsum(curve_KQ, 1)
        self.cdf_KQ /= self.cdf_KQ[:, -1:]
        self.entropy_K = -(curve_KQ * np.log(curve_KQ)).sum(1)
        self.shared_KQ = self.id_of_rank_V[np.searchsorted(self.unigram_cdf_V, rng.random((CONTEXTS, RANKS)))]

    def sequences(self, spec: SamplerSpec, sequences: int, seq_len: int) -> tuple[Array, SparseTargets]:
        """Tokens `[S, L+1]` uint32 and the targets of S * L rows, for `random` (with `keep_logp="none"`) or `threshold`."""
        tokens, parts = [], []
        for _ in range(sequences):
            # A sequence is about one thing: it uses a handful of the contexts.
            contexts = self.rng.integers(0, CONTEXTS, 64)
            where = Position(
                contexts[self.rng.integers(0, 64, seq_len)],
                self.rng.integers(0, 1 << 31, seq_len).astype(np.uint64),
                self.rng.random(seq_len) < SHARED,
            )
            label_R, label_rank_R = self._labels(where)
            tokens.append(np.append(self.id_of_rank_V[0], label_R))
            draw = self._threshold if spec.kind == "threshold" else self._random
            ids, weights, logp, n_R = draw(where, spec.draws)
            parts.append(
                SparseTargets(
                    offsets=np.append(0, np.cumsum(n_R)),
                    ids=ids.astype(np.int32),
                    weights=weights.astype(np.float32),
                    label_logp=np.log(self.p_KQ[where.context_R, label_rank_R]).astype(np.float32),
                    entropy=self.entropy_K[where.context_R].astype(np.float32),
                    logp=logp,
                )
            )
        return np.array(tokens, np.uint32), SparseTargets.concat(parts)

    def _ids(self, where: Position, row_E: Array, rank_E: Array, salt_E: Array | int = 0) -> Array:
        salted_E = where.key_R[row_E] ^ (np.asarray(salt_E, np.uint64) << np.uint64(32))
        hash_E = (rank_E.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        hash_E ^= salted_E * np.uint64(0xBF58476D1CE4E5B9)
        hash_E = (hash_E ^ (hash_E >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
        hash_E ^= hash_E >> np.uint64(29)
        uniform_E = (hash_E >> np.uint64(11)) / 2.0**53
        id_E = self.id_of_rank_V[np.searchsorted(self.unigram_cdf_V, uniform_E)]
        shared_E = where.shared_R[row_E] & (np.asarray(salt_E) == 0)
        id_E[shared_E] = self.shared_KQ[where.context_R[row_E[shared_E]], rank_E[shared_E]]
        return id_E

    def _distinct_ids(self, where: Position, row_E: Array, rank_E: Array) -> Array:
        """Ids, drawn again where a lower rank of the row has the id already."""
        salt_E = np.zeros(len(row_E), np.int64)
        while True:
            id_E = self._ids(where, row_E, rank_E, salt_E)
            key_E = row_E * self.vocab_size + id_E
            order_E = np.argsort(key_E, kind="stable")
            again = order_E[1:][key_E[order_E][1:] == key_E[order_E][:-1]]
            if not len(again):
                return id_E
            salt_E[again] += 1

    def _draw_ranks(self, where: Position, draws: int) -> Array:
        rank_RN = np.empty((len(where.context_R), draws), np.int64)
        uniform_RN = self.rng.random(rank_RN.shape)
        for context in np.unique(where.context_R):
            rows = where.context_R == context
            rank_RN[rows] = np.searchsorted(self.cdf_KQ[context], uniform_RN[rows])
        return rank_RN

    def _labels(self, where: Position) -> tuple[Array, Array]:
        rank_R = self._draw_ranks(where, 1)[:, 0]
        return self._ids(where, np.arange(len(rank_R)), rank_R), rank_R

    def _random(self, where: Position, draws: int) -> tuple[Array, Array, None, Array]:
        rows = len(where.context_R)
        rank_RN = self._draw_ranks(where, draws)
        id_RN = np.sort(self._ids(where, np.repeat(np.arange(rows), draws), rank_RN.ravel()).reshape(rows, draws), 1)
        new_RN = np.ones(id_RN.shape, bool)
        new_RN[:, 1:] = id_RN[:, 1:] != id_RN[:, :-1]
        count_E = np.diff(np.flatnonzero(new_RN.ravel()), append=new_RN.size)
        n_R = new_RN.sum(1)
        order_E = np.lexsort((id_RN[new_RN], -count_E, np.repeat(np.arange(rows), n_R)))
        return id_RN[new_RN][order_E], count_E[order_E] / draws, None, n_R

    def _threshold(self, where: Position, draws: int) -> tuple[Array, Array, Array, Array]:
        row, rank, weight, logp = [], [], [], []
        pivot = np.float32(-np.log(draws))
        for context in np.unique(where.context_R):
            rows = np.flatnonzero(where.context_R == context)
            p_Q = self.p_KQ[context]
            logp_Q = np.log(p_Q).astype(np.float32)
            head = int((logp_Q >= pivot).sum())
            tau = 1 - p_Q[:head].sum()
            many = max(1, int(draws * tau))
            tail_cdf = np.cumsum(p_Q[head:])
            point_Rm = (self.rng.random((len(rows), 1)) + np.arange(many)) / many * tail_cdf[-1]
            tail_Rm = head + np.minimum(np.searchsorted(tail_cdf, point_Rm), RANKS - head - 1)
            rank_Rn = np.concatenate([np.tile(np.arange(head), (len(rows), 1)), tail_Rm], axis=1)
            row.append(np.repeat(rows, head + many))
            rank.append(rank_Rn.ravel())
            weight.append(np.tile(np.append(p_Q[:head], np.full(many, tau / many)), len(rows)))
            logp.append(logp_Q[rank_Rn].ravel())
        order_E = np.argsort(np.concatenate(row), kind="stable")
        row_E, rank_E, weight_E, logp_E = (np.concatenate(x)[order_E] for x in (row, rank, weight, logp))
        id_E = self._distinct_ids(where, row_E, rank_E)
        head_E = logp_E >= pivot
        order_E = np.lexsort((id_E, np.where(head_E, -weight_E, 0), ~head_E, row_E))
        n_R = np.bincount(row_E, minlength=len(where.context_R))
        return id_E[order_E], weight_E[order_E], logp_E[order_E], n_R
