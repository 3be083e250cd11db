"""Which loss a run minimises: `LOSSES` maps a name to a function of the student's logits and a batch.

Shapes: `B` sequences, `L` positions, `N` = B * L rows, `V` vocabulary shared by student and teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from stillroom.kernels.sparse_kd import sparse_kd_loss
from stillroom.train.batch import Batch
from stillroom.train.config import LossName, MissingMass
from stillroom.train.dense_kd import dense_kd_loss


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss with its settings.

    Attributes:
        name: key of `LOSSES`.
        vocab_size: columns of the logits that take part; those beyond it are masked to -inf, which is to say left out.
        alpha: share of hard-label cross-entropy.
        missing: what becomes of mass the targets do not hold; any value for targets that sum to one.
        teacher: the live teacher of `full_kd`: tokens `[B, L]`, and positions where there are any, to logits `[N, V]`.
    """

    name: LossName
    vocab_size: int
    alpha: float = 0.0
    missing: MissingMass = "truncate"
    teacher: Callable[..., torch.Tensor] | None = None

    def __call__(self, logits_NV: torch.Tensor, batch: Batch, rows: float | torch.Tensor) -> LossTerms:
        """Loss of one micro-batch.

        Args:
            logits_NV: the student's logits, at least `vocab_size` columns; their memory may be reused for the gradient.
            batch: where they come from.
            rows: rows with a label in the whole optimizer step, which the loss is a mean over: micro-batches of any size
                then add up to the same gradient.
        """
        weights_N = batch.mask_BL.flatten().float() / rows  # a dense teacher speaks outside the mask too
        return LOSSES[self.name](self, logits_NV[:, : self.vocab_size], batch, weights_N)


@dataclass(frozen=True, slots=True)
class LossTerms:
    """A micro-batch's share of the step's loss, and of its two parts for the log.

    Attributes:
        loss: scalar, to be differentiated.
        kd: scalar, detached, mean KL term (nats per row); zero where the loss has none.
        ce: scalar, detached, mean cross-entropy with the labels (nats per row).
    """

    loss: torch.Tensor
    kd: torch.Tensor
    ce: torch.Tensor


def _forward_kl(objective: Objective, logits_NV: torch.Tensor, batch: Batch, weights_N: torch.Tensor) -> LossTerms:
    out = sparse_kd_loss(
        logits_NV,
        batch.targets,
        batch.labels_BL.flatten(),
        alpha=objective.alpha,
        missing=objective.missing,
        row_weights_N=weights_N,
        inplace=True,
    )
    return LossTerms(out.loss, weights_N @ out.kd_N, weights_N @ out.ce_N)


def _ce(objective: Objective, logits_NV: torch.Tensor, batch: Batch, weights_N: torch.Tensor) -> LossTerms:
    out = sparse_kd_loss(logits_NV, None, batch.labels_BL.flatten(), alpha=1.0, row_weights_N=weights_N, inplace=True)
    ce = weights_N @ out.ce_N
    return LossTerms(out.loss, torch.zeros_like(ce), ce)


def _full_kd(objective: Objective, logits_NV: torch.Tensor, batch: Batch, weights_N: torch.Tensor) -> LossTerms:
    assert objective.teacher is not None
    told_apart = () if batch.positions_BL is None else (batch.positions_BL,)
    teacher_NV = objective.teacher(batch.tokens_BL, *told_apart)
    labels_N = batch.labels_BL.flatten()
    out = dense_kd_loss(logits_NV, teacher_NV, labels_N, alpha=objective.alpha, row_weights_N=weights_N)
    return LossTerms(out.loss, weights_N @ out.kd_N, weights_N @ out.ce_N)


LOSSES: Final[dict[LossName, Callable[[Objective, torch.Tensor, Batch, torch.Tensor], LossTerms]]] = {
    "forward_kl": _forward_kl,
    "ce": _ce,
    "full_kd": _full_kd,
}


@dataclass(frozen=True, slots=True)
class LiveTeacher:
    """A frozen model in this process, as the `teacher` of an `Objective`.

    Attributes:
        model: a causal language model in evaluation mode.
        vocab_size: columns of its logits to return.
        dtype: precision of its matrix products.
    """

    model: nn.Module
    vocab_size: int
    dtype: torch.dtype = torch.float32

    @torch.no_grad()
    def __call__(self, tokens_BL: torch.Tensor, positions_BL: torch.Tensor | None = None) -> torch.Tensor:
        """Logits `[N, V]` for tokens `[B, L]`, at positions that start again with every document if they are given."""
        inputs = (
            {"input_ids": tokens_BL} if positions_BL is None else {"input_ids": tokens_BL, "position_ids": positions_BL}
        )
        with torch.autocast(tokens_BL.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            logits_BLV: torch.Tensor = self.model(**inputs, use_cache=False).logits
        return logits_BLV.flatten(0, 1)[:, : self.vocab_size]
