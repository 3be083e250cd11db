"""`SparseTargets`: the noun that crosses from disk to everything else.

Shapes: `R` rows (token positions), `E` entries (kept token ids over all rows).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

MAX_VOCAB_SIZE: Final = 1 << 24  # id_lo is 16 bits, id_hi 8


@dataclass(frozen=True, slots=True)
class SparseTargets:
    """Sparse next-token distributions of `R` rows in CSR form (numpy; `stillroom.kernels.targets` has the torch twin).

    Row `r` owns the entries `offsets[r]:offsets[r + 1]`. Its ids are unique. Entries the sampler kept exactly come first,
    by probability descending, then id; sampled entries of equal weight follow by id. A row may be empty (outside the loss
    mask).

    Attributes:
        offsets: `[R+1]` int64, starts at 0, never decreases, ends at `E`.
        ids: `[E]` int32, token ids.
        weights: `[E]` float32, an unbiased estimate of the teacher's probability of the id (top-k, top-p: the
            probability itself).
        label_logp: `[R]` float32, the teacher's log-probability of the row's label, nats.
        entropy: `[R]` float32, entropy of the teacher's distribution, nats.
        logp: `[E]` float32 or None, the teacher's log-probability of each id, nats; NaN where the cache does not keep it.
    """

    offsets: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    label_logp: npt.NDArray[np.float32]
    entropy: npt.NDArray[np.float32]
    logp: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        rows, entries = self.rows, self.entries
        for name, array, dtype, size in (
            ("offsets", self.offsets, np.int64, rows + 1),
            ("ids", self.ids, np.int32, entries),
            ("weights", self.weights, np.float32, entries),
            ("label_logp", self.label_logp, np.float32, rows),
            ("entropy", self.entropy, np.float32, rows),
            ("logp", self.logp, np.float32, entries),
        ):
            if array is not None and (array.dtype != dtype or array.shape != (size,)):
                raise ValueError(
                    f"`{name}` came as {array.dtype}{list(array.shape)}, wanted {np.dtype(dtype)}[{size}]: "
                    "build it with that dtype and length"
                )
        if self.offsets[0] != 0 or self.offsets[-1] != entries or np.any(self.offsets[1:] < self.offsets[:-1]):
            raise ValueError(f"`offsets` must start at 0, never decrease and end at the {entries} entries of `ids`")

    @property
    def rows(self) -> int:
        """Number of rows `R`."""
        return len(self.offsets) - 1

    @property
    def entries(self) -> int:
        """Number of kept entries `E` over all rows."""
        return len(self.ids)

    def slice_rows(self, start: int, stop: int) -> SparseTargets:
        """Rows `start:stop` as views of the same memory (offsets are rebased)."""
        lo, hi = int(self.offsets[start]), int(self.offsets[stop])
        return SparseTargets(
            offsets=self.offsets[start : stop + 1] - lo,
            ids=self.ids[lo:hi],
            weights=self.weights[lo:hi],
            label_logp=self.label_logp[start:stop],
            entropy=self.entropy[start:stop],
            logp=None if self.logp is None else self.logp[lo:hi],
        )

    @staticmethod
    def concat(parts: list[SparseTargets]) -> SparseTargets:
        """The rows of `parts`, one after the other; `logp` is kept where every part has it."""
        ends = np.cumsum([0] + [p.entries for p in parts])
        logps = [p.logp for p in parts if p.logp is not None]
        return SparseTargets(
            offsets=np.concatenate([[0]] + [p.offsets[1:] + end for p, end in zip(parts, ends)]).astype(np.int64),
            ids=np.concatenate([p.ids for p in parts]),
            weights=np.concatenate([p.weights for p in parts]),
            label_logp=np.concatenate([p.label_logp for p in parts]),
            entropy=np.concatenate([p.entropy for p in parts]),
            logp=np.concatenate(logps) if len(logps) == len(parts) else None,
        )
