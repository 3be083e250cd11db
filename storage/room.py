"""Where a read puts its rows: one set of arrays for all its sequences, filled group after group.

What is not filled of an array is never touched, so it costs no memory.

Shapes: `R` rows, `E` entries.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt

from stillroom.storage.decode import Entries, with_rows
from stillroom.storage.targets import SparseTargets

Array = npt.NDArray[Any]


class Room:
    """Room for the rows of a read.

    Args:
        rows: how many there will be.
        most: entries they have at most.
        logp: whether log-probabilities are wanted, and there to be had.

    Attributes:
        offsets: `[R+1]` int64, filled up to `rows`.
        ids: int32, filled up to `entries`.
        weights: float32, likewise.
        logp: float32, likewise, or None.
        rows: rows filled so far.
        entries: entries filled so far.
    """

    def __init__(self, rows: int, most: int, logp: bool) -> None:
        self.offsets = np.zeros(rows + 1, np.int64)
        self.ids = np.empty(most, np.int32)
        self.weights = np.empty(most, np.float32)
        self.logp = np.empty(most, np.float32) if logp else None
        self.rows = self.entries = 0
        self._codes: defaultdict[str, list[Array]] = defaultdict(list)

    def put(self, entries: Entries) -> None:
        """Add decoded entries."""
        rows, end = len(entries.offsets) - 1, self.entries + len(entries.ids)
        np.add(entries.offsets[1:], self.entries, out=self.offsets[self.rows + 1 : self.rows + 1 + rows])
        self.ids[self.entries : end], self.weights[self.entries : end] = entries.ids, entries.weights
        if self.logp is not None and entries.logp is not None:
            self.logp[self.entries : end] = entries.logp
        self.rows, self.entries = self.rows + rows, end

    def put_codes(self, codes: dict[str, Array]) -> None:
        """Add the stored tokens, `label_logp` and `entropy` of the rows just put."""
        for name, array in codes.items():
            self._codes[name].append(array)

    def targets(self) -> SparseTargets:
        """All rows."""
        end = self.entries
        logp = None if self.logp is None else self.logp[:end]
        entries = Entries(self.offsets, self.ids[:end], self.weights[:end], logp)
        return with_rows(entries, {name: self._all(name) for name in self._codes if name != "tokens"})

    def tokens(self, shape: tuple[int, int]) -> npt.NDArray[np.uint32]:
        """All tokens, `[B, L+1]`; `[B, 0]` where none were asked for."""
        return self._all("tokens").reshape(shape).astype(np.uint32) if 0 not in shape else np.zeros(shape, np.uint32)

    def _all(self, name: str) -> Array:
        parts = self._codes[name]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
