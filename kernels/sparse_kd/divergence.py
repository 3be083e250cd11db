"""Divergences between a sparse target and the student, each a row of one table.

A target keeps weights w_k, estimates of the teacher's p_k, and for most divergences p_k itself; the student's q_k is exact.
Every f-divergence is an expectation under the teacher of a function of r = q/p, so up to a constant

    D = constant + sum_k w_k f(r_k),      dD/dz_j = w_j g(r_j) - (sum_k w_k g(r_k)) q_j,      g(r) = r f'(r)

in the student's logits z: one number per kept entry and one per row decide everything. Adding a multiple of r - 1 to f changes
neither the full sum nor its gradient, since q and p sum to one; it is chosen so that f and g grow as slowly as they can,
which is what keeps the variance of a sampled target finite. Ids without an entry then count as p = 0, w = 0.

    forward_kl       -log r                                  g = -1
    reverse_kl       r log r - r               + 1           g = r log r                                not bounded
    jsd              -beta log m - (1-beta) h  + c           g = -(1-beta) h,   h = r log(1 + a/r),   a = beta/(1-beta),
                                                             m = beta + (1-beta) r, c = -(1-beta) log(1-beta)
    skew_kl          -log(s + (1-s) r)                       g = -(1-s) r / (s + (1-s) r)
    skew_reverse_kl  -h                        - log s       g = -h + a r/(a + r),   h as above,      a = (1-s)/s
    tvd              -min(r, 1)                + 1           g = -r [r < 1]

jsd = beta KL(p||m) + (1-beta) KL(q||m), m = beta p + (1-beta) q (arXiv 2306.13649); skew_kl = KL(p||s p + (1-s) q) and
skew_reverse_kl = KL(q||(1-s) p + s q) (arXiv 2402.03898); tvd = sum |p - q| / 2.
`forward_kl` needs no p: its value is sum w (log w - log q).

Shapes: `E` entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

import torch
from torch import Tensor

# (weights, teacher's log-probabilities, student's log-probabilities, parameter); all [E]
EntryFunction = Callable[[Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True, slots=True)
class Divergence:
    """One divergence, as functions of (weight, log p, log q, parameter) of an entry.

    Attributes:
        term: w f(r), the entry's contribution to the value.
        pull: w g(r), the derivative of its term by the student's log-probability.
        constant: what the value has beside the terms, by parameter.
        parameter: name of the argument of `sparse_kd_loss` it depends on, if any.
        needs_logp: whether log p is used.
    """

    term: EntryFunction
    pull: EntryFunction
    constant: Callable[[float], float] = lambda parameter: 0.0
    parameter: Literal["beta", "skew"] | None = None
    needs_logp: bool = True


def _forward_kl_term(w: Tensor, logp: Tensor, logq: Tensor, _: float) -> Tensor:
    return torch.where(w > 0, w * (w.log() - logq), 0.0)  # 0 log 0 = 0, also against q = 0


def _forward_kl_pull(w: Tensor, logp: Tensor, logq: Tensor, _: float) -> Tensor:
    return -w


def _reverse_kl_term(w: Tensor, logp: Tensor, logq: Tensor, _: float) -> Tensor:
    logr, wr = logq - logp, _times_ratio(w, logp, logq)
    return torch.where(wr > 0, wr * (logr - 1.0), 0.0)


def _reverse_kl_pull(w: Tensor, logp: Tensor, logq: Tensor, _: float) -> Tensor:
    logr, wr = logq - logp, _times_ratio(w, logp, logq)
    return torch.where(wr > 0, wr * logr, 0.0)


def _jsd_term(w: Tensor, logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    logr = logq - logp
    log_mixture = _log_mixture(logr, beta)
    return _weighted(w, -beta * log_mixture - (1.0 - beta) * _saturating(logr, math.log(beta / (1.0 - beta))))


def _jsd_pull(w: Tensor, logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    return _weighted(w, -(1.0 - beta) * _saturating(logq - logp, math.log(beta / (1.0 - beta))))


def _skew_kl_term(w: Tensor, logp: Tensor, logq: Tensor, skew: float) -> Tensor:
    return _weighted(w, -_log_mixture(logq - logp, skew))


def _skew_kl_pull(w: Tensor, logp: Tensor, logq: Tensor, skew: float) -> Tensor:
    return _weighted(w, -torch.sigmoid(logq - logp + math.log((1.0 - skew) / skew)))


def _skew_reverse_kl_term(w: Tensor, logp: Tensor, logq: Tensor, skew: float) -> Tensor:
    return _weighted(w, -_saturating(logq - logp, math.log((1.0 - skew) / skew)))


def _skew_reverse_kl_pull(w: Tensor, logp: Tensor, logq: Tensor, skew: float) -> Tensor:
    logr, log_a = logq - logp, math.log((1.0 - skew) / skew)
    return _weighted(w, math.exp(log_a) * torch.sigmoid(logr - log_a) - _saturating(logr, log_a))


def _tvd_term(w: Tensor, logp: Tensor, logq: Tensor, _: float) -> Tensor:
    return _weighted(w, -(logq - logp).clamp_max(0.0).exp())


def _tvd_pull(w: Tensor, logp: Tensor, logq: Tensor, _: float) -> Tensor:
    logr = logq - logp
    return _weighted(w, torch.where(logr < 0, -logr.clamp_max(0.0).exp(), 0.0))


DIVERGENCES: Final[Mapping[str, Divergence]] = MappingProxyType(
    {
        "forward_kl": Divergence(_forward_kl_term, _forward_kl_pull, needs_logp=False),
        "reverse_kl": Divergence(_reverse_kl_term, _reverse_kl_pull, lambda _: 1.0),
        "jsd": Divergence(_jsd_term, _jsd_pull, lambda beta: -(1.0 - beta) * math.log1p(-beta), "beta"),
        "skew_kl": Divergence(_skew_kl_term, _skew_kl_pull, parameter="skew"),
        "skew_reverse_kl": Divergence(
            _skew_reverse_kl_term, _skew_reverse_kl_pull, lambda skew: -math.log(skew), "skew"
        ),
        "tvd": Divergence(_tvd_term, _tvd_pull, lambda _: 1.0),
    }
)


def _weighted(w: Tensor, value: Tensor) -> Tensor:
    return torch.where(w > 0, w * value, 0.0)


def _times_ratio(w: Tensor, logp: Tensor, logq: Tensor) -> Tensor:
    """w q/p in one exponential: q itself where w = p, however small p is."""
    return torch.where(w > 0, (w.log() - logp + logq).exp(), 0.0)


def _log_mixture(logr: Tensor, share: float) -> Tensor:
    """log(share + (1 - share) r)."""
    return torch.logaddexp(torch.full_like(logr, math.log(share)), logr + math.log1p(-share))


def _saturating(logr: Tensor, log_a: float) -> Tensor:
    """r log(1 + a/r), which goes from 0 to a. Written a e**-u log(1 + e**u), u = log(a/r); a at u = log(eps) to all digits."""
    u = (log_a - logr).clamp(math.log(torch.finfo(logr.dtype).eps), 1e4)
    return math.exp(log_a) * (-u).exp() * (u.clamp_min(0.0) + torch.log1p((-u.abs()).exp()))
