"""What a run minimises: a loss, its settings and schedules, and who answers for the teacher.

Shapes: `B` sequences, `L` positions, `N` = B * L rows, `V` vocabulary shared by student and teacher, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from stillroom.kernels.fused_linear import fused_linear_sparse_kd
from stillroom.kernels.sparse_kd import SparseKDOutput
from stillroom.kernels.targets import SparseTargets
from stillroom.train.batch import Batch
from stillroom.train.config import LossName, MissingMass
from stillroom.train.loss import LOSSES, Request, Term
from stillroom.train.row_weights import RowWeights
from stillroom.train.schedule import Schedule
from stillroom.train.targets import Cached, LiveTeacher, TargetSource

ONE: Final = Schedule.constant(1.0)


@dataclass(frozen=True, slots=True)
class LossTerms:
    """A micro-batch's share of the step's loss, and of its two parts for the log.

    Attributes:
        loss: scalar, to be differentiated.
        kd: scalar, detached, mean of the teacher's part (nats per row); zero where the loss has none.
        ce: scalar, detached, mean cross-entropy with the labels (nats per row).
    """

    loss: torch.Tensor
    kd: torch.Tensor
    ce: torch.Tensor


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss with everything it needs.

    Attributes:
        name: key of `LOSSES`.
        vocab_size: columns of the logits that take part; those beyond it are masked to -inf, which is to say left out.
        targets: who answers for the teacher.
        alpha: share of hard-label cross-entropy.
        temperature: of both distributions in the divergence.
        taid: the teacher's share in TAID's target.
        missing: what becomes of mass the targets do not hold; any value for targets that sum to one.
        settings: the loss's own, fields of `Request`.
        row_weights: factors of the rows beside the mask; None: all alike.
    """

    name: LossName
    vocab_size: int
    targets: TargetSource = field(default_factory=Cached)
    alpha: Schedule = field(default_factory=lambda: Schedule.constant(0.0))
    temperature: Schedule = ONE
    taid: Schedule = ONE
    missing: MissingMass = "truncate"
    settings: Mapping[str, Any] = field(default_factory=dict)
    row_weights: RowWeights | None = None

    @property
    def fusable(self) -> bool:
        """Whether `fused` can compute it, from hidden states and head, without the logits."""
        return LOSSES[self.name].fusable and not isinstance(self.targets, LiveTeacher)

    def __call__(self, logits_NV: torch.Tensor, batch: Batch, rows: float | torch.Tensor, step: int = 0) -> LossTerms:
        """Loss of one micro-batch.

        Args:
            logits_NV: the student's logits, at least `vocab_size` columns; their memory may be reused for the gradient.
            batch: where they come from.
            rows: rows with a label in the whole optimizer step, which the loss is a mean over: micro-batches of any size
                then add up to the same gradient.
            step: optimizer step, from 0, for the schedules.
        """
        logits_NV = logits_NV[:, : self.vocab_size]
        terms = self._terms(batch, rows, step, lambda: logits_NV)
        labels_N = batch.labels_BL.flatten()
        # The last term may write its gradient over the logits: nobody looks at them any more.
        return _summed(
            [(term, term.of_logits(logits_NV, labels_N, inplace=term is terms[-1])) for term in terms],
            _rows(batch, rows),
        )

    def fused(
        self,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        batch: Batch,
        rows: float | torch.Tensor,
        step: int = 0,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
    ) -> LossTerms:
        """The same from hidden states and head, never more than a chunk of logits alive; only where it is `fusable`.

        Args:
            hidden_ND: what the head reads.
            weight_VD: the head, at least `vocab_size` rows.
            bias_V: its bias.
            batch: see `__call__`, as the next two.
            rows: see there.
            step: see there.
            logit_scale, softcap: as the model's head has them.
        """
        (term,) = self._terms(batch, rows, step, _no_logits)
        assert term.targets is None or isinstance(term.targets, SparseTargets)
        out = fused_linear_sparse_kd(
            hidden_ND, weight_VD, term.targets, batch.labels_BL.flatten(), bias_V=bias_V, logit_scale=logit_scale,
            softcap=softcap, vocab_size=self.vocab_size, **term.arguments(),
        )  # fmt: skip
        return _summed([(term, out)], _rows(batch, rows))

    def _terms(
        self, batch: Batch, rows: float | torch.Tensor, step: int, student: Callable[[], torch.Tensor]
    ) -> list[Term]:
        weights_N = _rows(batch, rows)
        if self.row_weights is not None:
            weights_N = weights_N * self.row_weights(batch)
        request = Request(
            None if self.name == "ce" else self.targets(batch),
            batch.labels_BL.flatten(),
            weights_N,
            alpha=self.alpha.at(step),
            temperature=self.temperature.at(step),
            taid=self.taid.at(step),
            missing=self.missing,
            **self.settings,
        )
        return LOSSES[self.name].terms(request, student)


def _rows(batch: Batch, rows: float | torch.Tensor) -> torch.Tensor:
    """One over the step's rows where a row counts: a dense teacher speaks outside the mask too."""
    return batch.mask_BL.flatten().float() / rows


def _summed(found: list[tuple[Term, SparseKDOutput]], weights_N: torch.Tensor) -> LossTerms:
    """The parts of the loss; the log's means are over rows, whatever these weigh in the loss."""
    loss = torch.stack([out.loss for _, out in found]).sum()
    # Not by `@`, which autocast would do in bfloat16.
    kd = torch.stack([(weights_N * term.share * out.kd_N).sum() for term, out in found]).sum()
    return LossTerms(loss, kd, (weights_N * found[-1][1].ce_N).sum())


def _no_logits() -> torch.Tensor:
    raise AssertionError("a fused loss does not look at the logits")
