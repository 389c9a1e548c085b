"""The softmax of a tile's rows in base 2, against a maximum that moves or one that may stay.

Law: exponents are differences from a maximum of the same row, so that no weight leaves the range of numbers.
"""

# mypy: disallow-incomplete-defs=false
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# The maximum starts at a finite number: masked logits, which are -inf, never meet another -inf in a difference.
FLOOR = gl.constexpr(-3.0e38)

# How far, in powers of two, weights may exceed one where the maximum is fixed: in bfloat16 up to the square root of its
# range, so that sums over all keys stay in it too, in float16 up to its end.
BFLOAT16_ROOM = gl.constexpr(64.0)
FLOAT16_ROOM = gl.constexpr(14.0)


@gluon.jit
def softmax(s, peak, scale, FIXED: gl.constexpr):
    """Weights of logits [64, N] against a maximum, their partial sums [64, 8], that maximum, what older sums shrink by.

    Sums stay in eight parts until the end, as they lie in the threads: no thread asks another one. Where the maximum is
    fixed, it is that of the first tile, nothing shrinks, and a third of the instructions of a tile is saved.
    """
    # The scale waits for the exponent, where it is part of a multiply-add that is there anyway.
    highest = peak if FIXED else gl.maximum(peak, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - highest[:, None])
    return p, gl.sum(p.reshape([64, s.shape[1] // 8, 8]), 1), highest, gl.exp2(peak - highest)


@gluon.jit
def may_stay(q, longest, peak, scale, ROOM: gl.constexpr):
    """Whether no logit of these 64 queries can exceed the maxima that they have by more than `ROOM` powers of two.

    A logit is at most the product of the lengths of its query and its key (Cauchy and Schwarz). What lies far below a
    maximum vanishes under a larger one too; only what lies above it could leave the range of numbers. NaN: no.
    """
    QUARTERS: gl.constexpr = gl.BlockedLayout([1, q.shape[1] // 4], [8, 4], [4, 1], [1, 0])
    x = q.load(QUARTERS).to(gl.float32)
    most = gl.sqrt(gl.sum(x * x, 1)) * longest * gl.abs(scale)
    fits = most - gl.convert_layout(peak, most.type.layout) <= ROOM
    # Each warp counts all rows, so that no warp asks another one.
    ALL: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    return gl.sum(gl.convert_layout(fits.to(gl.int32), ALL), 0) == 64


@gluon.jit
def with_own_key(acc, total, peak, q, own, rows, queries, scale, D: gl.constexpr):
    """The softmax of 64 rows after one more term, the key of its own that a query may have."""
    own_k, own_v, own_has, own_k_t, own_v_t = own
    layout: gl.constexpr = acc.type.layout
    lanes = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    has = gl.load(own_has + rows, mask=rows < queries, other=0) != 0
    place = rows.to(gl.int64)[:, None]
    key = gl.load(own_k + place * own_k_t + lanes[None, :], mask=has[:, None], other=0.0).to(gl.float32)
    value = gl.load(own_v + place * own_v_t + lanes[None, :], mask=has[:, None], other=0.0).to(gl.float32)
    logit = gl.where(has, gl.sum(q.load(layout).to(gl.float32) * key, 1) * scale, float("-inf"))
    highest = gl.maximum(peak, logit)
    p = gl.exp2(logit - highest)
    shrink = gl.exp2(peak - highest)
    return acc * shrink[:, None] + p[:, None] * value, total * shrink + p


@gluon.jit
def beside(x, y):
    """A number for each row, to be multiplied with the rows of `y`."""
    return gl.convert_layout(x, gl.SliceLayout(1, y.type.layout))[:, None]
