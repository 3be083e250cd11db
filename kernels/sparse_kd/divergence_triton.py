"""The formulas of `divergence.py` for a Triton kernel, and logarithms that keep their digits near 1.

Nothing of libdevice is used: the interpreter has none.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

FORWARD_KL, REVERSE_KL, JSD, SKEW_KL, SKEW_REVERSE_KL = (tl.constexpr(i) for i in range(5))  # order of `DIVERGENCES`
LOG_EPS: tl.constexpr = tl.constexpr(-15.942385)  # log(2**-23)


@triton.jit
def term(w, logp, logq, log_share, log_other, log_a, a, DIVERGENCE: tl.constexpr):
    """w f(r) of entries."""
    some = w > 0
    if DIVERGENCE == FORWARD_KL:
        return tl.where(some, w * (tl.log(tl.where(some, w, 1.0)) - logq), 0.0)
    logr = logq - logp
    if DIVERGENCE == REVERSE_KL:
        wr = tl.where(some, tl.exp(tl.log(tl.where(some, w, 1.0)) + logr), 0.0)
        return tl.where(wr > 0, wr * (logr - 1.0), 0.0)
    if DIVERGENCE == JSD:
        value = -tl.exp(log_share) * _log_mixture(logr, log_share, log_other)
        value -= tl.exp(log_other) * _saturating(logr, log_a, a)
    elif DIVERGENCE == SKEW_KL:
        value = -_log_mixture(logr, log_share, log_other)
    elif DIVERGENCE == SKEW_REVERSE_KL:
        value = -_saturating(logr, log_a, a)
    else:  # total variation
        value = -tl.exp(tl.minimum(logr, 0.0))
    return tl.where(some, w * value, 0.0)


@triton.jit
def pull_of(w, logp, logq, log_share, log_other, log_a, a, DIVERGENCE: tl.constexpr):
    """w g(r) of entries."""
    some = w > 0
    if DIVERGENCE == FORWARD_KL:
        return -w
    logr = logq - logp
    if DIVERGENCE == REVERSE_KL:
        wr = tl.where(some, tl.exp(tl.log(tl.where(some, w, 1.0)) + logr), 0.0)
        return tl.where(wr > 0, wr * logr, 0.0)
    if DIVERGENCE == JSD:
        value = -tl.exp(log_other) * _saturating(logr, log_a, a)
    elif DIVERGENCE == SKEW_KL:
        value = -1.0 / (1.0 + tl.exp(-(logr + log_a)))
    elif DIVERGENCE == SKEW_REVERSE_KL:
        value = a / (1.0 + tl.exp(log_a - logr)) - _saturating(logr, log_a, a)
    else:  # total variation
        value = tl.where(logr < 0.0, -tl.exp(tl.minimum(logr, 0.0)), 0.0)
    return tl.where(some, w * value, 0.0)


@triton.jit
def _log_mixture(logr, log_share, log_other):
    """log(share + other * r)."""
    x = logr + log_other
    return tl.maximum(x, log_share) + _log1p_exp(-tl.abs(x - log_share))


@triton.jit
def _saturating(logr, log_a, a):
    """r log(1 + a/r), from 0 to a."""
    u = tl.minimum(tl.maximum(log_a - logr, LOG_EPS), 1e4)
    return a * tl.exp(-u) * (tl.maximum(u, 0.0) + _log1p_exp(-tl.abs(u)))


@triton.jit
def _log1p_exp(x):
    """log(1 + exp(x)) for x <= 0: log of the rounded sum, corrected for what the rounding lost."""
    e = tl.exp(x)
    more = 1.0 + e
    lost = more == 1.0
    return tl.where(lost, e, tl.log(more) * (e / tl.where(lost, 1.0, more - 1.0)))


@triton.jit
def minus_expm1(x):
    """1 - exp(x) for x <= 0, to all digits: (1 - e) x / log(e) undoes the rounding of e."""
    e = tl.exp(x)
    near = e == 1.0
    far = e < 0.5
    return tl.where(near, -x, tl.where(far, 1.0 - e, (1.0 - e) * x / tl.log(tl.where(near | far, 0.5, e))))
