"""Expected squared error of a sampled target, in closed form, from the teacher's probabilities of a row.

The gradient of forward KL with respect to a row's logits is q - e for a student q and a target e that sums to one, and
q - p with the full teacher: the sampler's part of the gradient is p - e whatever the student, and its expected square is

    random      (1 - sum p**2) / N; with the proposal q ~ p**t: (sum p**2 / q - sum p**2) / N
    systematic  sum f (1 - f) / N**2 with f = frac(N p): a count is floor or ceil of N p
    stratified  sum over ids and cells of a (1 - a) / N**2, a = how much of a cell of mass 1/N the id covers
    threshold   T**2 / m - sum over the tail of p**2: tail ids (p < 1/N) of total mass T are each kept with chance m p / T,
                m = max(1, floor(N T)), at weight T / m; the head is exact
    top_k       sum of p**2 over what is left out: not noise but bias, the same in every draw and every row like it

The first four are unbiased: averaged over a batch of B rows their squared error falls as 1/B. A label drawn from the teacher
(plain cross-entropy) is `random` with N = 1; `relative` is the noise against that one's, as a ratio of standard deviations.
Sources: the first from Anshumann et al. (Sparse Logit Sampling, ACL 2025); systematic and stratified counts from
Douc, Cappe and Moulines (2005); the threshold form from Cohen et al. (VarOpt, 2009). Tests compare each with the sampler.

Shapes: `N` rows, `C` rows of a chunk, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

CHUNK_ELEMENTS: Final = 1 << 19  # float64 probabilities in work at a time, 4 MiB: they stay in the cache


def squared_error(logits_NV: Tensor, kind: str, draws: int, *, exponent: float = 1.0) -> Tensor:
    """Expected squared distance between a target and the teacher, `[N]` float64 on the host.

    Args:
        logits_NV: `[N, V]` of the teacher.
        kind: `random`, `systematic`, `stratified`, `threshold`, or `top_k` (its squared bias, nothing added for the missing
            mass).
        draws: N; the k of `top_k`.
        exponent: of the proposal of `random`.

    Raises:
        ValueError: there is no formula for `kind`.
    """
    if kind not in _FORMULAS:
        raise ValueError(f"`kind` came as {kind!r}: choose one of {', '.join(_FORMULAS)}")
    if kind != "random" or exponent == 1.0:
        return squared_errors(logits_NV, [(kind, draws)])[0]
    parts = []
    for logits_CV in _chunks(logits_NV):
        p_CV, q_CV = logits_CV.softmax(-1), (logits_CV * exponent).softmax(-1)
        parts.append(torch.where(p_CV > 0, p_CV**2 / q_CV, 0.0).sum(-1) - (p_CV**2).sum(-1))
    return (torch.cat(parts) / draws).clamp_min(0.0).cpu()


def squared_errors(logits_NV: Tensor, asked: Sequence[tuple[str, int]]) -> list[Tensor]:
    """`squared_error` of several (kind, draws) in one pass over the logits."""
    parts: list[list[Tensor]] = [[] for _ in asked]
    for logits_CV in _chunks(logits_NV):
        p_CV = logits_CV.softmax(-1)
        for found, (kind, draws) in zip(parts, asked, strict=True):
            found.append(_FORMULAS[kind](p_CV, draws))
    return [torch.cat(found).clamp_min(0.0).cpu() for found in parts]


def _chunks(logits_NV: Tensor) -> Iterator[Tensor]:
    step = max(1, CHUNK_ELEMENTS // logits_NV.shape[1])
    for start in range(0, len(logits_NV), step):
        yield logits_NV[start : start + step].double()


def _random(p_NV: Tensor, draws: int) -> Tensor:
    return (1 - (p_NV**2).sum(-1)) / draws


def _systematic(p_NV: Tensor, draws: int) -> Tensor:
    part_NV = (p_NV * draws).frac()
    return (part_NV - part_NV**2).sum(-1) / draws**2


def _stratified(p_NV: Tensor, draws: int) -> Tensor:
    end_NV = p_NV.cumsum(-1) * draws
    start_NV = torch.cat((torch.zeros_like(end_NV[:, :1]), end_NV[:, :-1]), dim=1)
    one_cell_NV = start_NV.floor() == end_NV.floor()
    first_NV = torch.where(one_cell_NV, end_NV - start_NV, 1 - start_NV.frac())
    last_NV = torch.where(one_cell_NV, 0.0, end_NV.frac())
    return (first_NV - first_NV**2 + last_NV - last_NV**2).sum(-1) / draws**2


def _threshold(p_NV: Tensor, draws: int) -> Tensor:
    tail_NV = torch.where(p_NV * draws >= 1, 0.0, p_NV)
    mass_N = tail_NV.sum(-1)
    return mass_N**2 / (mass_N * draws).floor().clamp_min(1) - (tail_NV**2).sum(-1)


def _top_k(p_NV: Tensor, draws: int) -> Tensor:
    kept_NK = p_NV.topk(min(draws, p_NV.shape[1]), dim=-1).values
    return (p_NV**2).sum(-1) - (kept_NK**2).sum(-1)


_FORMULAS: Final[dict[str, Callable[[Tensor, int], Tensor]]] = {
    "threshold": _threshold,
    "systematic": _systematic,
    "stratified": _stratified,
    "random": _random,
    "top_k": _top_k,
}
