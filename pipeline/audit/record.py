"""What a cache says of chosen sequences, as flat arrays: all that an audit without a teacher has.

Shapes: `R` rows that have a target, `E` their entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stillroom.storage.cache import Cache
from stillroom.storage.targets import SparseTargets

GROUP: int = 64  # sequences read at a time

FloatR = npt.NDArray[np.float64]
IntR = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Rows as they are stored.

    Attributes:
        sequence_R, shard_R, row_R, label_R: where a row is, and its label.
        label_logp_R, entropy_R, n_R: what is stored of it, and its number of entries.
        row_E, id_E, weight_E, logp_E: its entries; log-probability NaN where it is not kept.
    """

    sequence_R: IntR
    shard_R: IntR
    row_R: IntR
    label_R: IntR
    label_logp_R: FloatR
    entropy_R: FloatR
    n_R: IntR
    row_E: IntR
    id_E: IntR
    weight_E: FloatR
    logp_E: FloatR

    @property
    def rows(self) -> int:
        """Number of rows `R`."""
        return len(self.row_R)

    def sums(self, value_E: npt.NDArray[np.generic]) -> FloatR:
        """Sums of something of entries over each row."""
        return np.bincount(self.row_E, value_E.astype(np.float64), self.rows).astype(np.float64)

    @classmethod
    def of_targets(cls, targets: SparseTargets, labels_N: IntR, sequence_N: IntR, shard_N: IntR, row_N: IntR) -> Record:
        """From the targets of rows, some of which may be empty."""
        n_N = np.diff(targets.offsets)
        has_N = n_N > 0
        n_R = n_N[has_N]
        return cls(
            sequence_R=sequence_N[has_N],
            shard_R=shard_N[has_N],
            row_R=row_N[has_N],
            label_R=labels_N[has_N],
            label_logp_R=targets.label_logp[has_N].astype(np.float64),
            entropy_R=targets.entropy[has_N].astype(np.float64),
            n_R=n_R,
            row_E=np.repeat(np.arange(len(n_R)), n_R),
            id_E=targets.ids.astype(np.int64),
            weight_E=targets.weights.astype(np.float64),
            logp_E=np.full(targets.entries, np.nan) if targets.logp is None else targets.logp.astype(np.float64),
        )

    @classmethod
    def read(cls, cache: Cache, indices: list[int]) -> Record:
        """The rows of sequences at hand.

        Raises:
            DamagedError: a shard is damaged.
        """
        seq_len, parts, tokens = cache.manifest.packing.seq_len, [], []
        for start in range(0, len(indices), GROUP):
            batch = cache.read(indices[start : start + GROUP])
            parts.append(batch.targets)
            tokens.append(batch.tokens)
        numbers = np.array([cache.sequence_number(index) for index in indices], np.int64)
        return cls.of_targets(
            SparseTargets.concat(parts),
            np.concatenate(tokens)[:, 1:].astype(np.int64).ravel(),
            np.repeat(numbers, seq_len),
            np.repeat(numbers // cache.manifest.sequences_per_shard, seq_len),
            np.tile(np.arange(seq_len), len(numbers)),
        )
