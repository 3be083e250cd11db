"""What is measured of held-out rows: a number for each row and figure, NaN where a row can not tell.

A further figure is one more entry of what a `Measure` returns; sums by group are made in `views.py`. Softmax is float32.

Shapes: `N` rows of a chunk, `E` entries of their targets, `V` vocabulary that both models have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch.nn import functional

from stillroom.kernels.dense_kd import LOWEST_LOGP
from stillroom.kernels.targets import SparseTargets
from stillroom.storage.codes import logp_scale
from stillroom.storage.spec import SamplerSpec
from stillroom.train.validity import PARTIAL_KINDS

Values = dict[str, torch.Tensor]  # figure to its value in each row, [N]


@dataclass(frozen=True, slots=True)
class Rows:
    """A chunk of rows, all of which count.

    Attributes:
        label_N: int64, the text's next token.
        logq_NV: the student's log-probabilities, float32.
        guess_N: its first choice.
        position_N: int64, where in its sequence the row stands, or in its document where the packing tells them apart; from 0.
        sequence_N: int64, number of the sequence.
        teacher_NV: logits of the live teacher, if there is one.
        targets: what a cache keeps of these rows, if they come from one that is asked.
    """

    label_N: torch.Tensor
    logq_NV: torch.Tensor
    guess_N: torch.Tensor
    position_N: torch.Tensor
    sequence_N: torch.Tensor
    teacher_NV: torch.Tensor | None = None
    targets: SparseTargets | None = None


class Measure(Protocol):
    """Figures of rows."""

    @property
    def names(self) -> tuple[str, ...]:
        """The figures it gives."""

    def __call__(self, rows: Rows) -> Values:
        """Each figure's value in each row, `[N]`."""


@final
class OfStudent:
    """The student and the text."""

    names = ("lm_loss", "confidence", "hit")

    def __call__(self, rows: Rows) -> Values:
        """See `Measure`."""
        return {
            "lm_loss": -rows.logq_NV.gather(-1, rows.label_N[:, None])[:, 0],
            "confidence": rows.logq_NV.gather(-1, rows.guess_N[:, None])[:, 0].double().exp(),
            "hit": rows.guess_N == rows.label_N,
        }


@final
class OfTeacher:
    """The student and a live teacher: exact."""

    names = ("kl", "top1_agreement", "acceptance", "teacher_lm_loss")

    def __call__(self, rows: Rows) -> Values:
        """See `Measure`."""
        assert rows.teacher_NV is not None
        logp_NV = functional.log_softmax(rows.teacher_NV, dim=-1, dtype=torch.float32).clamp_(min=LOWEST_LOGP)
        p_NV = logp_NV.exp()
        values = {
            "teacher_lm_loss": -logp_NV.gather(-1, rows.label_N[:, None])[:, 0],
            "top1_agreement": logp_NV.argmax(-1) == rows.guess_N,
            "acceptance": torch.minimum(p_NV, rows.logq_NV.exp()).sum(-1),
        }
        values["kl"] = torch.linalg.vecdot(p_NV, logp_NV.sub_(rows.logq_NV.clamp(min=LOWEST_LOGP)))
        return values


@final
class OfShelf:
    """The student and what a cache keeps of the teacher.

    With weights w whose mean over draws is p, and the student's q known everywhere:

        KL(p || q) = -H(p) - sum_v p_v log q_v            estimated by  -H - sum_e w_e log q_e
        sum_v min(p_v, q_v) = sum_v p_v min(1, q_v / p_v)  estimated by  sum_e w_e min(1, q_e / p_e)

    Both are linear in w, hence without bias, but for what is stored in few bits: H to the nearest 1/15 nat, and log p, whose
    steps below 1/N are 18/63 nats apart (docs/evaluation.md has the bounds). A `top_k` or `top_p` cache lacks mass that no
    convention brings back, and gives neither. The teacher's first choice is the first entry wherever it is known to be kept: in
    `top_k`, `top_p`, and in `threshold` where some p >= 1/N.

    Args:
        spec: the sampler of the cache.
    """

    def __init__(self, spec: SamplerSpec) -> None:
        self._spec = spec
        self.sampled: tuple[str, ...] = ()
        if spec.kind not in PARTIAL_KINDS:
            self.sampled = ("kl", "acceptance") if spec.keep_logp == "all" else ("kl",)
        self.names = ("teacher_lm_loss", "top1_agreement", *self.sampled)

    def __call__(self, rows: Rows) -> Values:
        """See `Measure`."""
        targets = rows.targets
        assert targets is not None
        first_N = targets.offsets[:-1]
        if self._spec.kind in PARTIAL_KINDS:
            known_N = torch.ones_like(first_N, dtype=torch.bool)
        elif (
            self._spec.kind == "threshold" and targets.logp is not None
        ):  # NaN below 1/N where the head's alone are kept
            known_N = targets.logp[first_N] >= float(logp_scale(self._spec.draws).pivot_logp)
        else:
            known_N = torch.zeros_like(first_N, dtype=torch.bool)
        agrees_N = (targets.ids[first_N] == rows.guess_N).double()
        values = {"teacher_lm_loss": -targets.label_logp, "top1_agreement": agrees_N.masked_fill_(~known_N, math.nan)}
        if not self.sampled:
            return values
        row_E, weight_E = targets.entry_rows(), targets.weights.double()
        logq_E = rows.logq_NV[row_E, targets.ids.long()].clamp(min=LOWEST_LOGP).double()
        nothing_N = torch.zeros(targets.rows, dtype=torch.float64, device=logq_E.device)
        values["kl"] = -targets.entropy.double() - nothing_N.index_add(0, row_E, weight_E * logq_E)
        if "acceptance" in self.sampled:
            logp_E = logq_E.new_full((), math.nan) if targets.logp is None else targets.logp.double()
            kept_E = weight_E * (logq_E - logp_E).clamp_(max=0.0).exp()
            values["acceptance"] = nothing_N.index_add(0, row_E, kept_E)
        return values
