"""Philox4x32-10 and its normals: integers as in ``backends/philox.py``, normals to within 1e-6.

Logarithm, sine and cosine are polynomials (Cephes'), as in ``csrc/cpu/philox.h``: the GPU's own
fast logarithm has no digits near 1, where a radius is small.
"""

import triton
import triton.language as tl

PI_HALF = tl.constexpr(1.5707963267948966)


@triton.jit
def philox(key, transition, counter):
    """Four uint32 words per counter; key and transition are int64 scalars, counter int64 [N]."""
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = c0 & 0
    c2, c3 = zero | transition.to(tl.uint32), zero | (transition >> 32).to(tl.uint32)
    k0, k1 = zero | key.to(tl.uint32), zero | (key >> 32).to(tl.uint32)
    multiplier0, multiplier1 = zero | 0xD2511F53, zero | 0xCD9E8D57
    weyl0, weyl1 = zero | 0x9E3779B9, zero | 0xBB67AE85
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(multiplier0, c0), multiplier0 * c0
        high1, low1 = tl.umulhi(multiplier1, c2), multiplier1 * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += weyl0
        k1 += weyl1
    return c0, c1, c2, c3


@triton.jit
def log_unit(x):
    """Natural logarithm of float32 in (0, 1]."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) & 0xFF) - 126
    m = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)  # [0.5, 1)
    small = m < 0.70710678118654752440
    e = tl.where(small, exponent - 1, exponent).to(tl.float32)
    m = tl.where(small, m + m, m) - 1.0
    z = m * m
    p = 7.0376836292e-2 * m - 1.1514610310e-1
    p = tl.fma(p, m, 1.1676998740e-1)
    p = tl.fma(p, m, -1.2420140846e-1)
    p = tl.fma(p, m, 1.4249322787e-1)
    p = tl.fma(p, m, -1.6668057665e-1)
    p = tl.fma(p, m, 2.0000714765e-1)
    p = tl.fma(p, m, -2.4999993993e-1)
    p = tl.fma(p, m, 3.3333331174e-1)
    y = tl.fma(e, -2.12194440e-4, p * m * z) - 0.5 * z
    return tl.fma(e, 0.693359375, m + y)


@triton.jit
def sin_cos(x):
    """Sine and cosine of float32 within pi / 4 of 0."""
    z = x * x
    sine = tl.fma(-1.9515295891e-4 * z + 8.3321608736e-3, z, -1.6666654611e-1)
    cosine = tl.fma(2.443315711809948e-5 * z - 1.388731625493765e-3, z, 4.166664568298827e-2)
    return tl.fma(sine, z * x, x), tl.fma(cosine, z * z, 1.0 - 0.5 * z)


@triton.jit
def box_muller(radius_word, angle_word, T: tl.constexpr):
    """Two normals from a radius word and an angle word, first made exact float32 numbers."""
    uniform = tl.maximum(radius_word.to(tl.float32), 0.5) * 2.3283064365386963e-10  # 2^-32
    rest = (angle_word & 0x3FFFFFFF).to(tl.int32) - 0x20000000
    fraction = rest.to(tl.float32) * 9.313225746154785e-10  # 2^-30
    if tl.float64 == T:
        radius = tl.sqrt(-2.0 * tl.log(uniform.to(T)))
        angle = fraction.to(T) * PI_HALF
        sine, cosine = tl.sin(angle), tl.cos(angle)
    else:
        radius = tl.sqrt_rn(-2.0 * log_unit(uniform))
        sine, cosine = sin_cos(fraction * PI_HALF)
    quadrant = angle_word >> 30
    swap = (quadrant & 1) != 0
    radius = tl.where(quadrant >= 2, -radius, radius)
    return radius * tl.where(swap, -sine, cosine), radius * tl.where(swap, cosine, sine)


@triton.jit
def normals(key, transition, start, TILE: tl.constexpr, T: tl.constexpr):
    """Elements ``[start, start + TILE)`` of a transition's noise; start is a multiple of 4."""
    counter = start // 4 + tl.arange(0, TILE // 4)
    w0, w1, w2, w3 = philox(key, transition, counter.to(tl.int64))
    z0, z1 = box_muller(w0, w2, T)
    z2, z3 = box_muller(w1, w3, T)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
