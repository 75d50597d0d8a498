"""``exp(x) - 1`` in float64, to a few units in the last place, without a vendor's library.

Triton has no portable expm1: libdevice's is for NVIDIA alone, and the interpreter has none.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.6931471803691238)  # 32 bits, so that k * LN2_HIGH is exact
LN2_LOW = tl.constexpr(1.9082149292705877e-10)
OVERFLOW = tl.constexpr(709.782712893384)  # log of the largest float64
UNDERFLOW = tl.constexpr(-40.0)  # below, the result rounds to -1
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def expm1(x):
    """``2^k p + (2^k - 1)``, where ``x = k ln 2 + r`` and p is a Taylor polynomial of expm1(r).

    ``x`` is float64 of any shape.
    """
    inside = (x > UNDERFLOW) & (x <= OVERFLOW)
    y = tl.where(inside, x, 0.0)
    k = tl.floor(y * LOG2_E + 0.5)
    r = (y - k * LN2_HIGH) - k * LN2_LOW  # |r| <= ln 2 / 2
    p = r * 1.1470745597729725e-11 + 1.6059043836821613e-10  # 1 / 14!, 1 / 13!, and so on
    p = p * r + 2.08767569878681e-09
    p = p * r + 2.505210838544172e-08
    p = p * r + 2.755731922398589e-07
    p = p * r + 2.7557319223985893e-06
    p = p * r + 2.48015873015873e-05
    p = p * r + 0.0001984126984126984
    p = p * r + 0.001388888888888889
    p = p * r + 0.008333333333333333
    p = p * r + 0.041666666666666664
    p = p * r + 0.16666666666666666
    p = p * r + 0.5
    p = p * r * r + r
    half = ((k.to(tl.int64) + 1022) << 52).to(tl.float64, bitcast=True)  # 2^(k-1): 2^k may overflow
    y = tl.where(k == 0, p, 2.0 * (half * p + (half - 0.5)))
    y = tl.where(x <= UNDERFLOW, -1.0, y)
    return tl.where(inside | (x <= UNDERFLOW), y, x + INFINITY)  # +inf, or NaN
