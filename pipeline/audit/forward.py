"""The teacher over chosen sequences, the way stage one runs it; and once more, otherwise, to see how far its last bits go.

Shapes: `B` sequences, `L` rows of a sequence, `V` vocabulary, `X` width of what the head reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stillroom.pipeline.pieces import pieces_of
from stillroom.pipeline.teacher import Teacher
from stillroom.storage.segments import positions_of

Tokens = npt.NDArray[np.integer]
Starts = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Readings:
    """One sequence, read up to three times; logits `[L, V]` float32.

    Attributes:
        logits_LV: as stage one.
        control_LV: in a batch of another size and with attention computed another way.
        apart_LV: where documents are told apart, read as if they were not; else None.
    """

    logits_LV: Tensor
    control_LV: Tensor
    apart_LV: Tensor | None


def readings(teacher: Teacher, tokens_BL1: Tokens, starts_BL1: Starts | None, *, batch_size: int) -> Iterator[Readings]:
    """The sequences of one batch, in order; the whole batch's states are alive, and one sequence's logits at a time."""
    plain = states(teacher, tokens_BL1, starts_BL1, batch_size)
    apart = None if starts_BL1 is None else states(teacher, tokens_BL1, None, batch_size)
    for index in range(len(tokens_BL1)):
        one = slice(index, index + 1)
        with teacher.other_attention():
            control = states(teacher, tokens_BL1[one], None if starts_BL1 is None else starts_BL1[one],
                             1 if batch_size > 1 else 2)  # fmt: skip
        yield Readings(
            logits(teacher, plain[index]),
            logits(teacher, control[0]),
            None if apart is None else logits(teacher, apart[index]),
        )


@torch.inference_mode()
def states(teacher: Teacher, tokens_BL1: Tokens, starts_BL1: Starts | None, batch_size: int) -> Tensor:
    """What the head reads, `[B, L, X]`, of at most `batch_size` sequences; fewer are filled up with the first, for the shape."""
    rows_B = np.arange(batch_size)
    rows_B[len(tokens_BL1) :] = 0
    positions_BL = None if starts_BL1 is None else torch.from_numpy(positions_of(starts_BL1[rows_B]))
    tokens_BL = torch.from_numpy(tokens_BL1[rows_B, :-1].astype(np.int64))
    return teacher.body(tokens_BL, positions_BL)[: len(tokens_BL1)]


@torch.inference_mode()
def logits(teacher: Teacher, states_LX: Tensor) -> Tensor:
    """Logits `[L, V]` of a sequence's states, in the pieces stage one takes."""
    length = len(states_LX)
    out_LV = torch.empty(length, teacher.vocab_size, device=states_LX.device)
    for piece in pieces_of(1, length, teacher.vocab_size, states_LX.device):
        teacher.head(states_LX[piece.start : piece.stop], out=out_LV[piece.start : piece.stop])
    return out_LV
