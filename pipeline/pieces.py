"""What the head takes at once: whole sequences, or even parts of those whose logits are too many.

A piece depends on its sequence alone, so that the shapes of the head's matrix products do too.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

import torch

# Logits alive at a time. On a CPU few, for its caches; on a GPU many, because a launch costs the same for few rows.
LOGITS_BYTES: Final = {"cpu": 1 << 26, "cuda": 1 << 31}


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `start:stop` of sequence `index` of a batch."""

    index: int
    start: int
    stop: int


def piece_rows(length: int, vocabulary: int, device: torch.device) -> int:
    """Rows of a piece: a sequence of `length`, cut evenly where its float32 logits would be too many."""
    budget = LOGITS_BYTES.get(device.type, LOGITS_BYTES["cpu"])
    return -(-length // max(1, -(-length * vocabulary * 4 // budget)))


def pieces_of(sequences: int, length: int, vocabulary: int, device: torch.device) -> deque[Piece]:
    """The pieces of a batch, in order."""
    step = piece_rows(length, vocabulary, device)
    return deque(
        Piece(index, start, min(start + step, length)) for index in range(sequences) for start in range(0, length, step)
    )
