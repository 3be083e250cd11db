"""The sampler's Triton kernels; `triton.py` launches them.

Weights are computed from the logits wherever they are needed and never stored: `weights.py` has the function, spelled out
here once more in the same single-precision operations. **Every launch forbids fused multiply-add**: one rounding less in the
polynomial gives other whole numbers and other draws than the CPU's.

Reads of the logits: `maxima`, `sums` (and again for an exponent), then only blocks that a head, a draw or a key lies
in. One program works on one row; `locate` on a few draws of one. Whole numbers are int64, random words are uint32, for a
64-bit counter would silently choose another generator.

Shapes in the kernels: a tile is `[WIDE, BLOCK]`, WIDE blocks of a row; `B` blocks of a row, `PADDED` the power of two above.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined"
from __future__ import annotations

import triton
import triton.language as tl

from stillroom.kernels.sample.shares import ID_BITS, LAST_ID
from stillroom.kernels.sample.weights import COEFFICIENTS, LOWEST, ROUND

_LOWEST = tl.constexpr(LOWEST)
_ROUND = tl.constexpr(ROUND)
_C0, _C1, _C2, _C3, _C4 = (tl.constexpr(value) for value in COEFFICIENTS)
_ID_BITS, _LAST_ID = tl.constexpr(ID_BITS), tl.constexpr(LAST_ID)


# ---- one element -----------------------------------------------------------------------------------------------------


@triton.jit
def _power(logits, at, here, stride, top, rate):
    """t of ids: (logit - top) * rate, nothing below _LOWEST; ids that are not there are the lowest."""
    z = tl.load(logits + at.to(tl.int64) * stride, mask=here, other=float("-inf")).to(tl.float32)
    z = tl.where(
        z < float("inf"), z, float("-inf")
    )  # in a row that is refused, whose `top` is +inf: nothing weighs there
    power = (z - top) * rate
    return tl.where(power > _LOWEST, power, _LOWEST)


@triton.jit
def _whole(power):
    """Weight of a t, a whole number in float32."""
    scale = power + _ROUND
    fraction = power - (scale - _ROUND)
    weight = fraction + _C4
    weight = weight * fraction + _C3
    weight = weight * fraction + _C2
    weight = weight * fraction + _C1
    weight = weight * fraction + _C0
    bits = weight.to(tl.int32, bitcast=True) + (scale.to(tl.int32, bitcast=True) << 23)
    return tl.floor(bits.to(tl.float32, bitcast=True))


@triton.jit
def draw64(draw, sequence, row, seed_low, seed_high, STREAM: tl.constexpr):
    """64-bit random word of each draw of a row; the counter is that of `philox.py`."""
    pair = (draw >> 1).to(tl.uint32)
    zero = pair * 0
    c1 = zero + (((sequence & 0xFF) << 24) | row).to(tl.uint32)
    c2 = zero + (sequence >> 8).to(tl.uint32)
    c3 = zero + STREAM
    w0, w1, w2, w3 = tl.philox_impl(pair, c1, c2, c3, zero + seed_low.to(tl.uint32), zero + seed_high.to(tl.uint32), 10)
    odd = (draw & 1) == 1
    low = tl.where(odd, w2, w0).to(tl.uint64)
    high = tl.where(odd, w3, w1).to(tl.uint64)
    return (high << 32) | low


# ---- whole rows ------------------------------------------------------------------------------------------------------


@triton.jit
def maxima(logits, stride_n, stride_v, top, vocabulary, TILE: tl.constexpr):
    """Largest logit of a row, +inf for one that holds NaN."""
    n = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, TILE)
    best = tl.full((TILE,), float("-inf"), tl.float32)
    for first in range(0, vocabulary, TILE):
        at = first + lane
        z = tl.load(logits + n * stride_n + at.to(tl.int64) * stride_v, mask=at < vocabulary, other=float("-inf"))
        z = z.to(tl.float32)
        best = tl.maximum(best, tl.where(z == z, z, float("inf")))
    tl.store(top + n, tl.max(best, 0))


@triton.jit
def sums(
    logits, stride_n, stride_v, top, rate, blocks, total, moment, vocabulary, B, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    """Sums of the weights of blocks and of the row, and the row's moment."""
    n = tl.program_id(0).to(tl.int64)
    best = tl.load(top + n)
    lane = tl.arange(0, WIDE)
    mass = tl.zeros((WIDE,), tl.int64)
    moments = tl.zeros((WIDE,), tl.int64)
    for first in range(0, B, WIDE):
        at = (first + lane)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        power = _power(logits + n * stride_n, at, at < vocabulary, stride_v, best, rate)
        weight = _whole(power)
        sums = tl.sum(weight.to(tl.int64), 1)
        tl.store(blocks + n * B + first + lane, sums, mask=first + lane < B)
        mass += sums
        moments -= tl.sum(tl.floor(power * weight).to(tl.int64), 1)
    tl.store(total + n, tl.sum(mass, 0))
    tl.store(moment + n, tl.sum(moments, 0))


@triton.jit
def heads(
    logits, stride_n, stride_v, top, rate, blocks, least, ids, count, mass, start, vocabulary, B, most,
    PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Ids that weigh at least `least`: in a block whose sum does. They are taken out of the block sums."""
    n = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, PADDED)
    sums = tl.load(blocks + n * B + lane, mask=lane < B, other=0)
    edge = tl.load(least + n)
    best = tl.load(top + n)
    full = (lane < B) & (sums >= edge)
    left = tl.sum(sums, 0)
    found = 0
    block = -1
    for _ in range(0, tl.sum(full.to(tl.int32), 0)):
        block = tl.min(tl.where(full & (lane > block), lane, PADDED), 0)
        at = block * BLOCK + tl.arange(0, BLOCK)
        weight = _whole(_power(logits + n * stride_n, at, at < vocabulary, stride_v, best, rate)).to(tl.int64)
        head = weight >= edge
        place = found + tl.cumsum(head.to(tl.int32), 0) - 1
        tl.store(ids + n * most + place, (start + at).to(tl.int64), mask=head & (place < most))
        taken = tl.sum(tl.where(head, weight, 0), 0)
        tl.store(blocks + n * B + block, tl.sum(tl.where(lane == block, sums, 0), 0) - taken)
        left -= taken
        found += tl.sum(head.to(tl.int32), 0)
    tl.store(count + n, found.to(tl.int64))
    tl.store(mass + n, left)


# ---- a few draws of a row --------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def locate(
    logits, stride_n, stride_v, top, rate, blocks, least, total, many, before, mass, sequence, row, seed_low, seed_high,
    ids, start, vocabulary, B, most, STREAM: tl.constexpr,
    OWN: tl.constexpr, SPREAD: tl.constexpr, PUNCH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    DRAWS: tl.constexpr,
):  # fmt: skip
    """Ids of DRAWS points of a row, those of them that fall in this slice: the block, then the place inside it."""
    n = tl.program_id(0).to(tl.int64)
    step = tl.program_id(1) * DRAWS + tl.arange(0, DRAWS)
    count = tl.load(many + n)
    if tl.program_id(1) * DRAWS < count:
        whole_total = tl.load(total + n)
        draw = step if OWN else step * 0
        word = draw64(draw, tl.load(sequence + n), tl.load(row + n), seed_low, seed_high, STREAM)
        point = tl.umulhi(word, whole_total.to(tl.uint64)).to(tl.int64)
        if SPREAD:  # as `draw.spread`
            part = whole_total // count
            point = step * part + (step * (whole_total - part * count) + point) // count
        rest = point - tl.load(before + n)
        mine = (step < count) & (rest >= 0) & (rest < tl.load(mass + n))

        lane = tl.arange(0, PADDED)
        ends = tl.cumsum(tl.load(blocks + n * B + lane, mask=lane < B, other=0), 0)
        passed = ends[None, :] <= rest[:, None]
        block = tl.sum(passed.to(tl.int32), 1)
        rest -= tl.max(tl.where(passed, ends[None, :], 0), 1)

        at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        here = mine[:, None] & (at < vocabulary)
        power = _power(logits + n * stride_n, at, here, stride_v, tl.load(top + n), rate)
        weight = _whole(power).to(tl.int64)
        if PUNCH:
            weight = tl.where(weight >= tl.load(least + n), 0, weight)
        place = tl.sum((tl.cumsum(weight, 1) <= rest[:, None]).to(tl.int32), 1)
        found = tl.where(mine, start + block * BLOCK + place, 0)
        tl.store(ids + n * most + step, found.to(tl.int64), mask=step < count)


# ---- keys: a weight and the id counted down, so that the largest key is the largest weight of the lowest id -----------


@triton.jit
def _keys(logits, at, vocabulary, stride, top, rate, start):
    weight = _whole(_power(logits, at, at < vocabulary, stride, top, rate)).to(tl.int64)
    return tl.where(at < vocabulary, (weight << _ID_BITS) | (-(at + start) + _LAST_ID).to(tl.int64), -1)


@triton.jit
def block_keys(
    logits, stride_n, stride_v, top, rate, keys, start, vocabulary, B, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    """Largest key of each block of a row."""
    n = tl.program_id(0).to(tl.int64)
    best = tl.load(top + n)
    lane = tl.arange(0, WIDE)
    for first in range(0, B, WIDE):
        at = (first + lane)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        key = _keys(logits + n * stride_n, at, vocabulary, stride_v, best, rate, start)
        tl.store(keys + n * B + first + lane, tl.max(key, 1), mask=first + lane < B)


@triton.jit
def window_keys(
    logits, stride_n, stride_v, top, rate, chosen, keys, start, vocabulary, many,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """All keys of the chosen blocks of a row."""
    n = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    block = tl.load(chosen + n * many + lane, mask=lane < many, other=0)
    inside = tl.arange(0, BLOCK)[None, :]
    key = _keys(
        logits + n * stride_n, block[:, None] * BLOCK + inside, vocabulary, stride_v, tl.load(top + n), rate, start
    )
    tl.store(keys + (n * many + lane[:, None]) * BLOCK + inside, key, mask=lane[:, None] < many)
