"""Triton kernels of the distillation loss; `triton.py` launches them and says how a row is worked.

Formulas are those of `divergence.py` and `rows.py`; names as there. `X` logits, `G` gradient, `OFF` offsets, `Z` scratch for
the entries' logits, `HOLES` one bit per id, set where it does not belong to the tail. Row offsets are int64: N * V passes
2**31. An id out of range is not read; its row's values are NaN, so that it shows without a check beforehand.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from stillroom.kernels.sparse_kd.divergence_triton import FORWARD_KL, minus_expm1, pull_of, term
from stillroom.kernels.sparse_kd.problem import LEAST_MISSING

INF: tl.constexpr = tl.constexpr(float("inf"))
LEAST: tl.constexpr = tl.constexpr(LEAST_MISSING)
RENORMALISE_TEACHER, RENORMALISE_BOTH, TAIL_BUCKET = (tl.constexpr(i) for i in range(1, 4))  # order of `MISSING_MASS`


@triton.jit
def mark_kernel(HOLES, words, OFF, IDS, LAB, V, LABEL: tl.constexpr, KBLOCK: tl.constexpr):
    """Set the bit of every entry, and with `LABEL` of the label, in the row's words."""
    row = tl.program_id(0).to(tl.int64)
    lo = tl.load(OFF + row)
    n = (tl.load(OFF + row + 1) - lo).to(tl.int32)
    HOLES += row * words
    for start in range(0, n, KBLOCK):
        k = start + tl.arange(0, KBLOCK)
        ids = tl.load(IDS + lo + k, mask=k < n, other=-1).to(tl.int32)
        tl.atomic_or(HOLES + (ids >> 5), tl.full((KBLOCK,), 1, tl.int32) << (ids & 31), mask=(ids >= 0) & (ids < V))
    if LABEL:
        y = tl.load(LAB + row).to(tl.int32)
        tl.atomic_or(HOLES + (y >> 5), tl.full((), 1, tl.int32) << (y & 31), mask=(y >= 0) & (y < V))


@triton.jit
def scale_kernel(G, g_stride, SCALE, per_row, V, EMULATE: tl.constexpr, BLOCK: tl.constexpr):
    """A row times its scale, in place."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(SCALE + row * per_row)
    if scale != 1.0:
        G += row * g_stride
        for start in range(0, V, BLOCK):
            j = start + tl.arange(0, BLOCK)
            g = tl.load(G + j, mask=j < V, other=0.0).to(tl.float32)
            tl.store(G + j, _rounded(g * scale, EMULATE, G.dtype.element_ty), mask=j < V)


@triton.jit
def rows_kernel(
    X, x_stride, G, g_stride, OFF, IDS, W, LOGP, LAB, WEIGHT, LABEL_LOGP, TKD, DKD, Z, HOLES_AT, words, KD, CE,
    V, alpha, temperature, log_share, log_other, log_a, a, constant,
    TARGETS: tl.constexpr, DIVERGENCE: tl.constexpr, MISSING: tl.constexpr, SPLIT: tl.constexpr, HOLES: tl.constexpr,
    POWER: tl.constexpr, GRADIENT: tl.constexpr, EMULATE: tl.constexpr, KBLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Values and gradient of one row. `POWER` 0 means T = 1."""
    row = tl.program_id(0).to(tl.int64)
    X += row * x_stride
    weight = tl.load(WEIGHT + row).to(tl.float32)
    if GRADIENT:
        G += row * g_stride
    if weight == 0.0:  # ignored: nothing of the row is looked at
        tl.store(KD + row, 0.0)
        tl.store(CE + row, 0.0)
        if GRADIENT:
            for start in range(0, V, BLOCK):
                j = start + tl.arange(0, BLOCK)
                tl.store(G + j, tl.zeros((BLOCK,), tl.float32).to(G.dtype.element_ty), mask=j < V)
    else:
        y = tl.load(LAB + row).to(tl.int32)
        bad = ((y < 0) | (y >= V)).to(tl.int32)
        zy = tl.load(X + y, mask=bad == 0, other=-INF).to(tl.float32)
        it = 1.0 / temperature
        if TARGETS:
            lo = tl.load(OFF + row)
            n = (tl.load(OFF + row + 1) - lo).to(tl.int32)

        # ---- the entries: gather their logits before anything is written
        top, mass, others, label_kept, kept_top = zy, 0.0, 0.0, 0, -INF
        if TARGETS:
            for start in range(0, n, KBLOCK):
                k = start + tl.arange(0, KBLOCK)
                ids = tl.load(IDS + lo + k, mask=k < n, other=-1).to(tl.int32)
                fine = (ids >= 0) & (ids < V)
                bad += tl.sum(((k < n) & (fine == 0)).to(tl.int32), 0)
                z = tl.load(X + ids, mask=fine, other=-INF).to(tl.float32)
                tl.store(Z + lo + k, z, mask=k < n)
                w = tl.load(W + lo + k, mask=k < n, other=0.0)
                mass += tl.sum(w, 0)
                others += tl.sum(tl.where(ids == y, 0.0, w), 0)
                label_kept += tl.sum((fine & (ids == y)).to(tl.int32), 0)
                kept_top = tl.maximum(kept_top, tl.max(z, 0))
            top = tl.maximum(top, kept_top)
            tl.debug_barrier()

        # ---- the row: sums of exponentials at T (d) and at 1 (d1), of the tail alone where there are holes
        d, d1 = 0.0, 0.0
        for start in range(0, V, BLOCK):
            j = start + tl.arange(0, BLOCK)
            x = tl.load(X + j, mask=j < V, other=-INF, eviction_policy="evict_last").to(tl.float32)
            if HOLES:
                word = tl.load(HOLES_AT + row * words + (j >> 5), mask=j < V, other=0)
                x = tl.where(((word >> (j & 31)) & 1) == 1, -INF, x)
            higher = tl.maximum(top, tl.max(x, 0))
            safe = tl.where(higher == -INF, 0.0, higher)  # nothing but -inf so far: exp(-inf - -inf) is NaN
            e = tl.exp((x - safe) * it)
            d = d * tl.exp((top - safe) * it) + tl.sum(e, 0)
            if POWER != 0:
                d1 = d1 * tl.exp(top - safe) + tl.sum(_at_one(e, x - safe, POWER), 0)
            top = higher
        if POWER == 0:
            d1 = d
        s, s1 = d, d1
        kept_sum = 0.0  # of exponentials at T relative to the highest entry
        rest_sum = d  # over every id but the label
        if TARGETS and (HOLES or MISSING == RENORMALISE_BOTH):
            for start in range(0, n, KBLOCK):
                k = start + tl.arange(0, KBLOCK)
                ids = tl.load(IDS + lo + k, mask=k < n, other=-1).to(tl.int32)
                z = tl.load(Z + lo + k, mask=k < n, other=-INF)
                kept_sum += tl.sum(tl.exp(tl.where(k < n, z - kept_top, -INF) * it), 0)
                if HOLES:
                    e = tl.exp((z - top) * it)
                    s += tl.sum(e, 0)
                    s1 += tl.sum(tl.exp(z - top), 0)
                    rest_sum += tl.sum(tl.where(ids == y, 0.0, e), 0)
            if SPLIT:  # noqa: SIM102  # one is decided when the kernel is compiled, the other for each row
                if label_kept == 0:
                    s += tl.exp((zy - top) * it)
                    s1 += tl.exp(zy - top)
        log_s = tl.log(s)
        ce = tl.log(s1) - (zy - top)

        # ---- the divergence: value, and the pull of every entry
        kd, pulled, inverse, log_mass, rest = 0.0, 0.0, 1.0, 0.0, 0.0
        along, bucket, label_pull, log_u, dkd = 0.0, 0.0, 0.0, 0.0, 0.0
        if SPLIT:
            label_logp = tl.load(LABEL_LOGP + row)
            tkd = tl.load(TKD + row)
            dkd = tl.load(DKD + row)
            label_logq = (zy - top) * it - log_s
            p = tl.exp(label_logp)
            unc = minus_expm1(label_logp)
            u = rest_sum / s
            log_u = tl.log(tl.where(u > 0, u, 1.0)) + tl.where(u > 0, 0.0, -INF)
            rest_mass = unc
            if MISSING == RENORMALISE_TEACHER:
                rest_mass = others
            usable = (mass > 0) & (rest_mass > 0)
            inverse = tl.where(usable, 1.0 / tl.where(usable, rest_mass, 1.0), 0.0)
        elif (MISSING == RENORMALISE_TEACHER) | (MISSING == RENORMALISE_BOTH):
            inverse = 1.0 / tl.where(mass > 0, mass, 1.0)
            log_mass = tl.log(tl.where(mass > 0, mass, 1.0))
        log_kept = tl.log(tl.where(kept_sum > 0, kept_sum, 1.0))
        if TARGETS:
            for start in range(0, n, KBLOCK):
                k = start + tl.arange(0, KBLOCK)
                ids = tl.load(IDS + lo + k, mask=k < n, other=-1).to(tl.int32)
                w, logp, logq = _entry(
                    ids, y, k, n, lo, W, LOGP, Z, top, log_s, kept_top, log_kept, log_u, inverse, log_mass, it,
                    DIVERGENCE, MISSING, SPLIT,
                )  # fmt: skip
                kd += tl.sum(term(w, logp, logq, log_share, log_other, log_a, a, DIVERGENCE), 0)
                pulled += tl.sum(pull_of(w, logp, logq, log_share, log_other, log_a, a, DIVERGENCE), 0)
        if SPLIT:
            if MISSING == TAIL_BUCKET:
                rest = tl.where(usable & (d > 0) & (1.0 + pulled > LEAST), 1.0 + pulled, 0.0)
                log_tail = tl.log(tl.where(d > 0, d, 1.0)) - tl.log(tl.where(rest_sum > 0, rest_sum, 1.0))
                kd += tl.where(rest > 0, rest * (tl.log(tl.where(rest > 0, rest, 1.0)) - log_tail), 0.0)
                pulled -= rest
                bucket = -dkd * rest
            tkd_value = tl.where(p > 0, p * (label_logp - label_logq), 0.0)
            tkd_value += tl.where(unc > 0, unc * (tl.log(tl.where(unc > 0, unc, 1.0)) - log_u), 0.0)
            excess = tl.where(p < 0.5, tl.exp(label_logq) - p, unc - u)  # q_g - p_g, of the smaller numbers
            label_pull = tl.where(mass > 0, tkd * excess, 0.0)
            along = tl.where(u > 0, (-dkd * pulled - label_pull) / tl.where(u > 0, u, 1.0), 0.0)
            kd = tl.where(mass > 0, tkd * tkd_value, 0.0) + dkd * kd
        else:
            kd += tl.where(mass > 0, constant, 0.0)
            if MISSING == TAIL_BUCKET:
                rest = tl.where((mass > 0) & (d > 0) & (1.0 - mass > LEAST), 1.0 - mass, 0.0)
                log_rest = tl.log(tl.where(rest > 0, rest, 1.0))
                log_tail = tl.log(tl.where(d > 0, d, 1.0)) - log_s
                kd += term(rest, log_rest, log_tail, log_share, log_other, log_a, a, DIVERGENCE)
                bucket = pull_of(rest, log_rest, log_tail, log_share, log_other, log_a, a, DIVERGENCE)
                pulled += bucket
            along = -pulled
        tl.store(KD + row, tl.where(bad > 0, float("nan"), kd * temperature * temperature))
        tl.store(CE + row, tl.where(bad > 0, float("nan"), ce))

        if GRADIENT:
            kd_scale = weight * (1.0 - alpha) * temperature
            ce_scale = weight * alpha
            c1 = ce_scale / s1
            c = kd_scale * along / s  # of an entry; in the tail the bucket's pull comes on top
            if MISSING == RENORMALISE_BOTH:
                c = 0.0
            tail_c = c
            if MISSING == TAIL_BUCKET:
                tail_c += tl.where(d > 0, kd_scale * bucket / tl.where(d > 0, d, 1.0), 0.0)
            for start in range(0, V, BLOCK):
                j = start + tl.arange(0, BLOCK)
                x = tl.load(X + j, mask=j < V, other=-INF, eviction_policy="evict_first").to(tl.float32)
                e = tl.exp((x - top) * it)
                g = e * tail_c + _at_one(e, x - top, POWER) * c1
                tl.store(G + j, _rounded(g, EMULATE, G.dtype.element_ty), mask=j < V, cache_modifier=".cs")
            tl.debug_barrier()  # the entries are written over what the stream left there
            if TARGETS:
                for start in range(0, n, KBLOCK):
                    k = start + tl.arange(0, KBLOCK)
                    ids = tl.load(IDS + lo + k, mask=k < n, other=-1).to(tl.int32)
                    w, logp, logq = _entry(
                        ids, y, k, n, lo, W, LOGP, Z, top, log_s, kept_top, log_kept, log_u, inverse, log_mass, it,
                        DIVERGENCE, MISSING, SPLIT,
                    )  # fmt: skip
                    pull = pull_of(w, logp, logq, log_share, log_other, log_a, a, DIVERGENCE)
                    z = tl.load(Z + lo + k, mask=k < n, other=-INF)
                    e = tl.exp((z - top) * it)
                    e1 = tl.exp(z - top)
                    write = (ids >= 0) & (ids < V)
                    if SPLIT:
                        g = kd_scale * dkd * pull + (e * c + e1 * c1)
                        write = write & (ids != y)
                    else:
                        if MISSING == RENORMALISE_BOTH:
                            pull -= pulled * tl.exp(logq)
                        g = kd_scale * pull + (e * c + e1 * c1) - tl.where(ids == y, ce_scale, 0.0)
                    tl.store(G + ids, _rounded(g, EMULATE, G.dtype.element_ty), mask=write)
            gy = tl.exp(zy - top) * c1 - ce_scale
            if SPLIT:
                gy += kd_scale * label_pull
                tl.store(G + y, _rounded(gy, EMULATE, G.dtype.element_ty), mask=bad == 0)
            else:
                gy += tl.exp((zy - top) * it) * tail_c
                tl.store(G + y, _rounded(gy, EMULATE, G.dtype.element_ty), mask=(bad == 0) & (label_kept == 0))


@triton.jit
def _entry(
    ids, y, k, n, lo, W, LOGP, Z, top, log_s, kept_top, log_kept, log_u, inverse, log_mass, it,
    DIVERGENCE: tl.constexpr, MISSING: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Weight, log p and log q of entries after the convention for missing mass."""
    w = tl.load(W + lo + k, mask=k < n, other=0.0) * inverse
    z = tl.load(Z + lo + k, mask=k < n, other=-INF)
    logq = (z - top) * it - log_s
    if SPLIT:
        w = tl.where(ids == y, 0.0, w)
        logq -= log_u
    if MISSING == RENORMALISE_BOTH:
        logq = tl.where(k < n, (z - kept_top) * it - log_kept, -INF)
    logp = logq
    if DIVERGENCE != FORWARD_KL:
        logp = tl.load(LOGP + lo + k, mask=k < n, other=0.0) - log_mass
    return w, logp, logq


@triton.jit
def _at_one(e, over, POWER: tl.constexpr):
    """exp(over) where e = exp(over / T)."""
    if POWER == 0:
        return e
    elif POWER == 2:
        return e * e
    elif POWER == 3:
        return e * e * e
    elif POWER == 4:
        return (e * e) * (e * e)
    else:
        return tl.exp(over)


@triton.jit
def _rounded(x, EMULATE: tl.constexpr, dtype: tl.constexpr):
    """To the gradient's type, to nearest even; spelled out for the interpreter, which cuts a bfloat16's last bits off."""
    if EMULATE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)
