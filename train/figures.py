"""What is measured of held-out rows: counters that are shown a chunk of rows at a time and give their figures at the end.

A counter of another figure is one more class with `add` and `figures`. Sums are float64, softmax float32.

Shapes: `N` rows of a chunk, `E` entries of their targets, `V` vocabulary that both models have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Protocol, final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from stillroom.kernels.dense_kd import LOWEST_LOGP
from stillroom.kernels.targets import SparseTargets
from stillroom.storage.codes import logp_scale
from stillroom.storage.spec import SamplerSpec
from stillroom.train.validity import PARTIAL_KINDS

BINS: Final = 15


@dataclass(frozen=True, slots=True)
class Rows:
    """A chunk of rows, all of which count.

    Attributes:
        label_N: int64, the text's next token.
        logq_NV: the student's log-probabilities, float32.
        guess_N: its first choice.
        teacher_NV: logits of the live teacher, if there is one.
        targets: what a cache keeps of these rows, if they come from one that is asked.
    """

    label_N: torch.Tensor
    logq_NV: torch.Tensor
    guess_N: torch.Tensor
    teacher_NV: torch.Tensor | None = None
    targets: SparseTargets | None = None


class Counter(Protocol):
    """Sums over rows."""

    def add(self, rows: Rows) -> None:
        """Count a chunk."""

    def figures(self) -> dict[str, Any]:
        """Fields of an `Evaluation`."""


def calibration_error(bins_3: npt.NDArray[np.float64]) -> float:
    """Expected calibration error from `[3, bins]`: rows, summed confidence and hits of each bin."""
    rows, confidence, hits = bins_3
    return float(np.abs(confidence - hits).sum() / rows.sum())


@final
class StudentCounter:
    """The student and the text."""

    def __init__(self) -> None:
        self.rows = 0
        self._lm_loss = 0.0
        self._bins = np.zeros((3, BINS))

    def add(self, rows: Rows) -> None:
        """Count a chunk."""
        confidence_N = rows.logq_NV.gather(-1, rows.guess_N[:, None])[:, 0].double().exp()
        hit_N = (rows.guess_N == rows.label_N).double()
        bin_N = (confidence_N * BINS).ceil().long().sub_(1).clamp_(0, BINS - 1)
        for row, weight_N in enumerate((torch.ones_like(hit_N), confidence_N, hit_N)):
            self._bins[row] += torch.bincount(bin_N, weight_N, minlength=BINS).cpu().numpy()
        self.rows += len(rows.label_N)
        self._lm_loss -= total(rows.logq_NV.gather(-1, rows.label_N[:, None]))

    def figures(self) -> dict[str, Any]:
        """Fields of an `Evaluation`."""
        lm_loss = self._lm_loss / self.rows
        return {
            "rows": self.rows,
            "lm_loss": lm_loss,
            "perplexity": math.exp(min(lm_loss, 700.0)),
            "ece": calibration_error(self._bins),
        }


@final
class TeacherCounter:
    """The student and a live teacher: exact."""

    def __init__(self) -> None:
        self._rows = 0
        self._sums = np.zeros(4)  # kl, agreement, acceptance, teacher's lm_loss

    def add(self, rows: Rows) -> None:
        """Count a chunk."""
        assert rows.teacher_NV is not None
        logp_NV = functional.log_softmax(rows.teacher_NV, dim=-1, dtype=torch.float32).clamp_(min=LOWEST_LOGP)
        p_NV = logp_NV.exp()
        self._rows += len(rows.label_N)
        self._sums[3] -= total(logp_NV.gather(-1, rows.label_N[:, None]))
        self._sums[1] += total(logp_NV.argmax(-1) == rows.guess_N)
        self._sums[2] += total(torch.minimum(p_NV, rows.logq_NV.exp()).sum(-1))
        self._sums[0] += total(torch.linalg.vecdot(p_NV, logp_NV.sub_(rows.logq_NV.clamp(min=LOWEST_LOGP))))

    def figures(self) -> dict[str, Any]:
        """Fields of an `Evaluation`."""
        kl, agreement, acceptance, lm_loss = (float(s) for s in self._sums / self._rows)
        return {"kl": kl, "top1_agreement": agreement, "acceptance": acceptance, "teacher_lm_loss": lm_loss}


@final
class ShelfCounter:
    """The student and what a cache keeps of the teacher.

    With weights w whose mean over draws is p, and the student's q known everywhere:

        KL(p || q) = -H(p) - sum_v p_v log q_v            estimated by  -H - sum_e w_e log q_e
        sum_v min(p_v, q_v) = sum_v p_v min(1, q_v / p_v)  estimated by  sum_e w_e min(1, q_e / p_e)

    Both are linear in w, hence without bias, but for what is stored in few bits: H to the nearest 1/15 nat, and log p, whose
    steps below 1/N are 18/63 nats apart (docs/losses.md, "Held-out figures", has the bounds). A `top_k` or `top_p` cache lacks
    mass that no convention brings back, and gives neither. The teacher's first choice is the first entry wherever it is known
    to be kept: in `top_k`, `top_p`, and in `threshold` where some p >= 1/N.

    Args:
        spec: the sampler of the cache.
    """

    def __init__(self, spec: SamplerSpec) -> None:
        self._spec = spec
        self._rows = self._top_rows = 0
        self._kl = self._agreement = self._acceptance = self._lm_loss = 0.0

    def add(self, rows: Rows) -> None:
        """Count a chunk."""
        targets = rows.targets
        assert targets is not None
        self._rows += targets.rows
        self._lm_loss -= total(targets.label_logp)
        first_N = targets.offsets[:-1]
        if self._spec.kind in PARTIAL_KINDS:
            known_N = torch.ones_like(first_N, dtype=torch.bool)
        elif (
            self._spec.kind == "threshold" and targets.logp is not None
        ):  # NaN below 1/N where the head's alone are kept
            known_N = targets.logp[first_N] >= float(logp_scale(self._spec.draws).pivot_logp)
        else:
            known_N = torch.zeros_like(first_N, dtype=torch.bool)
        self._top_rows += int(known_N.sum())
        self._agreement += total((targets.ids[first_N] == rows.guess_N)[known_N])
        if self._spec.kind in PARTIAL_KINDS:
            return
        logq_E = rows.logq_NV[targets.entry_rows(), targets.ids.long()].clamp(min=LOWEST_LOGP).double()
        weight_E = targets.weights.double()
        self._kl -= total(targets.entropy) + float(weight_E @ logq_E)
        if targets.logp is None:
            self._acceptance = math.nan
        else:
            self._acceptance += float(weight_E @ (logq_E - targets.logp.double()).clamp_(max=0.0).exp())

    def figures(self) -> dict[str, Any]:
        """Fields of an `Evaluation`."""
        found: dict[str, Any] = {"teacher_lm_loss": _known(self._lm_loss / self._rows)}
        if self._top_rows:
            found |= {"top1_agreement": self._agreement / self._top_rows, "top1_rows": self._top_rows}
        if self._spec.kind not in PARTIAL_KINDS:
            found["kl"] = _known(self._kl / self._rows)
            if self._spec.keep_logp == "all":
                found["acceptance"] = _known(self._acceptance / self._rows)
        sampled = tuple(name for name in ("kl", "acceptance") if found.get(name) is not None)
        return {**found, "sampled": sampled}


def total(x: torch.Tensor) -> float:
    """Sum in float64."""
    return float(x.sum(dtype=torch.float64))


def _known(figure: float) -> float | None:
    """None where a row lacks what the figure is made of."""
    return None if math.isnan(figure) else figure
