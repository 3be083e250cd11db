"""The losses of a run: `LOSSES` maps a name to what it makes of a batch's targets, a list of `Term`s.

A term is one divergence of one target by one set of row weights, what the kernels compute; most losses are one. A loss that
looks at the student first (TAID, adaptive KL) reads the logits once more and needs them whole. `docs/losses.md` has every
formula with its source, `validity.py` which cache carries it.

Shapes: `N` rows, `V` vocabulary, `E` entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

import torch

from stillroom.kernels.dense_kd import dense_kd_loss
from stillroom.kernels.sparse_kd import DIVERGENCES, SparseKDOutput, TargetSplit, sparse_kd_loss
from stillroom.kernels.targets import SparseTargets, tempered
from stillroom.storage.gather import Column
from stillroom.train.config import LossName, MissingMass
from stillroom.train.targets import DenseTargets, Targets, log_partition


@dataclass(frozen=True, slots=True)
class Term:
    """`sum_n weights_N [(1 - alpha) T**2 D + alpha CE]` of one target.

    Attributes:
        targets: of the teacher; None for cross-entropy alone (alpha 1).
        weights_N: float32 factors of the rows.
        alpha: share of cross-entropy.
        temperature: T of the divergence; the targets are those of T already.
        missing: convention for mass that a sparse target lacks.
        options: divergence and its parameters, or a split, as the kernels take them.
        share: part of the row's divergence that this term is, for the log.
    """

    targets: Targets | None
    weights_N: torch.Tensor
    alpha: float = 0.0
    temperature: float = 1.0
    missing: MissingMass = "truncate"
    options: dict[str, Any] = field(default_factory=dict)
    share: torch.Tensor | float = 1.0

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the sparse kernels."""
        return dict(
            alpha=self.alpha, temperature=self.temperature, missing=self.missing, row_weights_N=self.weights_N,
            **self.options,
        )  # fmt: skip

    def of_logits(self, logits_NV: torch.Tensor, labels_N: torch.Tensor, *, inplace: bool) -> SparseKDOutput:
        """Loss and its parts by row; with `inplace` the logits' memory may be used for the gradient."""
        if isinstance(self.targets, DenseTargets):
            settings = {name: value for name, value in self.arguments().items() if name != "missing"}
            return dense_kd_loss(logits_NV, self.targets.logits_NV, labels_N, **settings)
        return sparse_kd_loss(logits_NV, self.targets, labels_N, inplace=inplace, **self.arguments())


@dataclass(frozen=True, slots=True)
class Request:
    """What a loss is asked for one micro-batch.

    Attributes:
        targets: the teacher's; None for cross-entropy.
        labels_N: -100 where there is none.
        weights_N: float32 factors of the rows.
        alpha, temperature, taid: the numbers of this step.
        missing: convention for missing mass.
        beta, skew: parameters of divergences.
        label_factor, rest_factor: of DKD.
        easy_weight, hard_share, hard_upto: of ATKD: lambda, the share of hard rows, and the log-probability of the label up to
            which a row is hard.
        head_mass: of AKL.
        head_size, tail_factor: of tail-aware top-k.
        head_logp: log-probability from which on a threshold cache's entries are its head.
    """

    targets: Targets | None
    labels_N: torch.Tensor
    weights_N: torch.Tensor
    alpha: float = 0.0
    temperature: float = 1.0
    taid: float = 1.0
    missing: MissingMass = "truncate"
    beta: float = 0.5
    skew: float = 0.1
    label_factor: float = 1.0
    rest_factor: float = 0.5
    easy_weight: float = 0.2
    hard_share: float = 0.5
    hard_upto: float = 0.0
    head_mass: float = 0.5
    head_size: int = 10
    tail_factor: float = 2.0
    head_logp: float = 0.0

    @property
    def told(self) -> Targets:
        """The targets of a loss that has some."""
        assert self.targets is not None
        return self.targets

    def term(self, targets: Targets | None = None, **options: Any) -> Term:
        """The one term of a loss that is one."""
        return Term(targets or self.told, self.weights_N, self.alpha, self.temperature, self.missing, options=options)

    def terms(self, *parts: tuple[Targets, torch.Tensor | float, MissingMass, dict[str, Any]]) -> list[Term]:
        """Several divergences `(targets, factor of the rows, missing, options)` and the cross-entropy beside them."""
        kd_N = (1.0 - self.alpha) * self.weights_N
        found = [Term(t, kd_N * factor, 0.0, 1.0, missing, options, factor) for t, factor, missing, options in parts]
        return found + ([Term(None, self.alpha * self.weights_N, 1.0)] if self.alpha else [])


Student = Callable[[], torch.Tensor]  # gives the student's logits, `[N, V]`, to look at


@dataclass(frozen=True, slots=True)
class Loss:
    """One loss.

    Attributes:
        terms: what it makes of a request; may call for the student's logits.
        settings: the settings that are this loss's alone.
        looks: whether it looks at the student first, so that it needs the logits whole.
        parts: terms it has at most.
        columns: what it reads of a cache beside ids and weights.
    """

    terms: Callable[[Request, Student], list[Term]]
    settings: tuple[str, ...] = ()
    looks: bool = False
    parts: int = 1
    columns: tuple[Column, ...] = ()

    @property
    def fusable(self) -> bool:
        """Whether one pass over the logits, made a chunk at a time, is enough."""
        return not self.looks and self.parts == 1


def _divergence(name: str) -> Callable[[Request, Student], list[Term]]:
    parameter = DIVERGENCES[name].parameter

    def terms(request: Request, student: Student) -> list[Term]:
        targets = request.told
        if request.temperature != 1.0 and isinstance(targets, SparseTargets):
            targets = tempered(targets, request.temperature)
        options = {} if parameter is None else {parameter: getattr(request, parameter)}
        return [request.term(targets, divergence=name, **options)]

    return terms


def _dkd(request: Request, student: Student) -> list[Term]:
    """Decoupled KD (arXiv 2203.08679): label_factor * TKD + rest_factor * DKD."""
    one_N = torch.ones_like(request.weights_N)
    return [request.term(split=TargetSplit(one_N * request.label_factor, one_N * request.rest_factor))]


def _atkd(request: Request, student: Student) -> list[Term]:
    """ATKD (arXiv 2402.11890): lambda * mean over easy rows of DKD + (1 - lambda) * mean over hard rows of TKD + DKD.

    The paper splits each micro-batch at its median; here the split is a quantile of the whole cache, so the means over easy
    and hard rows are sums over all rows by their expected numbers, `1 - hard_share` and `hard_share` of them.
    """
    targets, share = request.told, request.hard_share
    logp_N = targets.label_logp(request.labels_N) if isinstance(targets, DenseTargets) else targets.label_logp
    easy_N = logp_N > request.hard_upto
    hard, easy = (1.0 - request.easy_weight) / share, request.easy_weight / (1.0 - share)
    tkd_N = torch.where(easy_N, 0.0, torch.full_like(request.weights_N, hard))
    return [request.term(split=TargetSplit(tkd_N, torch.where(easy_N, easy, tkd_N)))]


def _taid(request: Request, student: Student) -> list[Term]:
    """TAID (arXiv 2501.16937): KL to softmax((1 - t) z_student + t z_teacher), the student's part held fixed.

    That distribution is p r**(1 - t) / Z with r = q/p: from weights w of p come w r**(1 - t) / Z, self-normalised.
    """
    targets, t = request.told, request.taid
    if t == 1.0:
        return [request.term()]
    logits_NV = student().detach()
    if isinstance(targets, DenseTargets):
        mixed_NV = logits_NV.float().mul(1.0 - t).add_(targets.logits_NV.float(), alpha=t)
        return [request.term(DenseTargets(mixed_NV))]
    row_E, logr_E = _log_ratio(targets, logits_NV)
    power_E = torch.where(targets.weights > 0, targets.weights * (logr_E * (1.0 - t)).exp(), 0.0)
    sum_N = power_E.new_zeros(targets.rows).index_add_(0, row_E, power_E)
    weight_E = power_E / torch.where(sum_N > 0, sum_N, 1.0)[row_E]
    return [request.term(replace(targets, weights=weight_E))]


def _akl(request: Request, student: Student) -> list[Term]:
    """Adaptive KL (arXiv 2404.02657): forward KL by the gap's share in the head, reverse KL by its share in the tail.

    The head of a row is its ids of largest p up to `head_mass`, and always the first; the gap of a part is sum |p - q|, the
    student held fixed. Over entries that is sum w |1 - r|.
    """
    targets, logits_NV = request.told, student().detach()
    if isinstance(targets, DenseTargets):
        p_NV, order_NV = targets.logits_NV.float().softmax(1).sort(dim=1, descending=True)
        gap_NV = (p_NV - logits_NV.float().softmax(1).gather(1, order_NV)).abs_()
        head_NV = p_NV.cumsum(1) <= request.head_mass
        head_NV[:, 0] = True
        head_N, all_N = (gap_NV * head_NV).sum(1), gap_NV.sum(1)
    else:
        row_E, logr_E = _log_ratio(targets, logits_NV)
        weight_E = targets.weights.double()
        before_E = weight_E.cumsum(0) - weight_E
        first_E = targets.offsets[row_E]
        before_E = before_E - before_E[first_E]
        head_E = (before_E + weight_E <= request.head_mass) | (torch.arange(len(row_E), device=row_E.device) == first_E)
        gap_E = targets.weights * (1.0 - logr_E.exp()).abs()
        none_N = gap_E.new_zeros(targets.rows)
        head_N, all_N = none_N.index_add(0, row_E, gap_E * head_E), none_N.index_add(0, row_E, gap_E)
    share_N = torch.where(all_N > 0, head_N / all_N.clamp(min=1e-30), 1.0)
    missing = request.missing
    return request.terms(
        (targets, share_N, missing, {"divergence": "forward_kl"}),
        (targets, 1.0 - share_N, missing, {"divergence": "reverse_kl"}),
    )


def _tail_aware(request: Request, student: Student) -> list[Term]:
    """Tail-aware top-k (arXiv 2602.20816): KL over the `head_size` first ids and a bucket, plus `tail_factor` times the rest.

    KL = KL(head + bucket) + P(tail) KL(tail), so the loss is tail_factor * KL + (1 - tail_factor) * KL(head + bucket).
    """
    return request.terms(
        (request.told, request.tail_factor, "truncate", {}),
        (_head(request.told, request.head_size, request.head_logp), 1.0 - request.tail_factor, "tail_bucket", {}),
    )


def _head(targets: Targets, size: int, head_logp: float) -> SparseTargets:
    """The `size` likeliest ids of every row, exact: of a threshold cache those of them that its head holds.

    Args:
        targets: of the teacher.
        size: most ids of a row.
        head_logp: log-probability from which on a threshold cache's entries are its head.
    """
    if isinstance(targets, DenseTargets):
        p_NV = targets.logits_NV.float().softmax(1)
        rows, count = len(p_NV), min(size, p_NV.shape[1])
        p_NK, id_NK = p_NV.topk(count, dim=1)
        offsets = torch.arange(rows + 1, device=p_NV.device) * count
        nothing_N = p_NV.new_zeros(rows)
        return SparseTargets(offsets, id_NK.flatten().to(torch.int32), p_NK.flatten(), nothing_N, nothing_N)
    assert targets.logp is not None
    row_E = targets.entry_rows()
    place_E = torch.arange(len(row_E), device=row_E.device) - targets.offsets[row_E]
    kept_E = (place_E < size) & (targets.logp >= head_logp)  # NaN, which a sampled entry may have, is not
    counts_N = torch.zeros_like(targets.label_logp, dtype=torch.int64).index_add_(0, row_E, kept_E.to(torch.int64))
    offsets = torch.cat((counts_N.new_zeros(1), counts_N.cumsum(0)))
    return replace(
        targets, offsets=offsets, ids=targets.ids[kept_E], weights=targets.weights[kept_E], logp=targets.logp[kept_E]
    )


def _log_ratio(targets: SparseTargets, logits_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row of every entry, and log q/p there."""
    assert targets.logp is not None
    row_E = targets.entry_rows()
    logits_E = logits_NV[row_E, targets.ids.long()].float()
    return row_E, logits_E - log_partition(logits_NV)[row_E] - targets.logp


def _ce(request: Request, student: Student) -> list[Term]:
    return [Term(None, request.weights_N, 1.0)]


LOSSES: Final = MappingProxyType[LossName, Loss](
    {
        "ce": Loss(_ce),
        "forward_kl": Loss(_divergence("forward_kl")),
        "reverse_kl": Loss(_divergence("reverse_kl"), columns=("logp",)),
        "jsd": Loss(_divergence("jsd"), ("beta",), columns=("logp",)),
        "skew_kl": Loss(_divergence("skew_kl"), ("skew",), columns=("logp",)),
        "skew_reverse_kl": Loss(_divergence("skew_reverse_kl"), ("skew",), columns=("logp",)),
        "tvd": Loss(_divergence("tvd"), columns=("logp",)),
        "dkd": Loss(_dkd, ("label_factor", "rest_factor"), columns=("label_logp",)),
        "atkd": Loss(_atkd, ("easy_weight", "hard_share"), columns=("label_logp",)),
        "taid": Loss(_taid, ("taid_start", "taid_end", "taid_schedule"), looks=True, columns=("logp",)),
        "akl": Loss(_akl, ("head_mass",), looks=True, parts=3, columns=("logp",)),
        "tail_aware": Loss(_tail_aware, ("head_size", "tail_factor"), parts=3, columns=("logp",)),
    }
)
