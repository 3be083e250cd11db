"""Whether a model reads the documents of a packed sequence apart, told by positions that start again: measured, not believed.

Models that ignore positions (recurrent ones, or attention that is not told of them) mix documents without a word. So one is
asked: the logits of a document behind another must be those of the document alone.

Shapes: `B` sequences, `L` positions, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

BEFORE: Final = 9  # tokens of the document in front
LENGTH: Final = 8  # of the document that is compared
TOLERANCE: Final = {torch.float32: 1e-4, torch.float64: 1e-4}  # of the largest logit; 16 bits: 3e-2

Logits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@torch.no_grad()
def mixing(logits: Logits, *, vocab_size: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """What is wrong with how a model reads packed documents, in words, or None.

    Two sequences are read at once, because some attention tells documents apart in a batch of one only.

    Args:
        logits: the model: tokens and positions `[B, L]` to logits `[B, L, V]`.
        vocab_size: ids it knows.
        dtype: of its arithmetic.
        device: where it takes its tokens.
    """
    tokens_2L = (torch.arange(2 * (BEFORE + LENGTH), device=device) * 37 % vocab_size).view(2, -1)
    tokens_2L[1, BEFORE:] = tokens_2L[0, BEFORE:]
    positions_L = torch.cat([torch.arange(BEFORE), torch.arange(LENGTH)]).to(device)
    try:
        packed_2LV = logits(tokens_2L, positions_L.expand(2, -1))[:, BEFORE:].float()
        alone_2LV = logits(tokens_2L[:, BEFORE:], positions_L[BEFORE:].expand(2, -1)).float()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"it takes no positions ({(str(error).splitlines() or [type(error).__name__])[0]})"
    gap = float((packed_2LV - alone_2LV).abs().max() / alone_2LV.abs().max())
    if gap <= TOLERANCE.get(dtype, 3e-2):
        return None
    return f"the logits of a document behind another differ by {gap:.1%} from those of the document alone"
