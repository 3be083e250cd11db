"""Positions that start again at every document, for teacher and student alike.

Shapes: `B` sequences, `L` positions, `L1` = L + 1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def positions_of(starts_BL1: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Position of each token a model reads within its document, `[B, L]`; a sequence's first token is at 0 in any case.

    Args:
        starts_BL1: tokens that begin a document; the last column is a label only.
    """
    place_L = np.arange(starts_BL1.shape[1] - 1)
    begun_BL = np.where(starts_BL1[:, :-1], place_L, 0)
    result: npt.NDArray[np.int64] = place_L - np.maximum.accumulate(begun_BL, axis=1)
    return result
