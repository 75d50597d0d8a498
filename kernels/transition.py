"""One transition's formulas on a tile of its elements, shared by every kernel.

Symbols are those of docs/math.md, and roundings those of ``csrc/transition.h``. Kernels have to be
launched without floating-point fusion: what is to be fused is written ``tl.fma``.
"""

from collections import namedtuple
from collections.abc import Iterable
from typing import Any

import triton
import triton.language as tl

from ..transitions import Latents
from .philox import normals

TILE = tl.constexpr(4096)  # elements that a program holds at once


def group(name: str, fields: Iterable[str]) -> Any:
    """A named tuple for kernels to take, whose fields are listed elsewhere."""
    return namedtuple(name, tuple(fields))


# The latents and seed of a call, and the counters that noise begins with if it is a shard's: either
# pointers, None where absent, or the strides of each over K and B.
Operands = group("Operands", (*Latents._fields, "seed", "counter"))


@triton.jit
def load(pointer, strides, k, i, start, inside, T: tl.constexpr):
    """``[start, start + TILE)`` of latent (k, i); 0 unless ``inside``; k, i and start are int64."""
    base = k * strides[0] + i * strides[1] + start
    return tl.load(pointer + base + tl.arange(0, TILE), mask=inside, other=0.0).to(T)


@triton.jit
def counted(t, strides, k, i, start, inside):
    """Which of a tile's elements the mask counts, bool; only where a mask is given."""
    base = k * strides.mask[0] + i * strides.mask[1] + start
    return tl.load(t.mask + base + tl.arange(0, TILE), mask=inside, other=0) != 0


@triton.jit
def rounded(value, to: tl.constexpr):
    """``value`` in another dtype; float64 becomes float32 before it becomes a 16-bit one."""
    if value.dtype == tl.float64:
        if (to == tl.bfloat16) or (to == tl.float16):
            value = value.to(tl.float32)
    return value.to(to)


@triton.jit
def store(pointer, strides, k, i, start, inside, value):
    """Writes what :func:`load` reads, rounded once to the pointer's dtype."""
    base = k * strides[0] + i * strides[1] + start
    value = rounded(value, pointer.dtype.element_ty)
    tl.store(pointer + base + tl.arange(0, TILE), value, mask=inside)


@triton.jit
def step_coefficient(table, strides, c: tl.constexpr, k, i):
    """The c-th of transition (k, i)'s coefficients (a, b, s, kappa, dt), in float64."""
    return tl.load(table + c * strides[0] + k * strides[1] + i * strides[2])


@triton.jit
def mean(a, b, x, v):
    """``a x + b v``: one multiplication, one fused multiply-add, here and in the rollout alike."""
    return tl.fma(v, b, a * x)


@triton.jit
def velocity(t, strides, k, i, start, inside, guidance_scale, T: tl.constexpr):
    """v, or with guidance ``uncond + scale (v - uncond)``, which rounds after each operator."""
    v = load(t.model_output, strides.model_output, k, i, start, inside, T)
    if t.model_output_uncond is not None:
        uncond = load(t.model_output_uncond, strides.model_output_uncond, k, i, start, inside, T)
        v = uncond + tl.full((), guidance_scale, T) * (v - uncond)
    return v


@triton.jit
def noise_of(t, strides, k, i, start, inside, T: tl.constexpr):
    """The noise of a tile, read, or regenerated from the seed."""
    if t.seed is not None:
        seed = t.seed + k * strides.seed[0] + i * strides.seed[1]
        if t.counter is not None:
            start += 4 * tl.load(t.counter + k * strides.counter[0] + i * strides.counter[1])
        noise = normals(tl.load(seed), tl.load(seed + 1), start, TILE, T)
    else:
        noise = load(t.noise, strides.noise, k, i, start, inside, T)
    return noise


@triton.jit
def differences(t, strides, k, i, start, inside, moving, behaving, v, a, b, s, T: tl.constexpr):
    """``delta = mean - m``, ``e = y - m`` and the departure ``y - mean`` of the operands' form.

    Operands that only ``delta`` and the departure need are read where ``moving``; the behaviour
    policy's mean or velocity, which the departure does not need, is read where ``behaving``. So a
    gradient reads none that its coefficients make unnecessary.
    """
    if (t.noise is not None) or (t.seed is not None):
        old = load(t.old_model_output, strides.old_model_output, k, i, start, moving, T)
        delta = b * (v - old)
        e = s * noise_of(t, strides, k, i, start, inside, T)
        departure = e - delta
    elif t.old_model_output is not None:
        x = load(t.sample, strides.sample, k, i, start, inside, T)
        y = load(t.prev_sample, strides.prev_sample, k, i, start, inside, T)
        old = load(t.old_model_output, strides.old_model_output, k, i, start, behaving, T)
        delta = b * (v - old)
        # y - (a x + b old) would round twice at the size of the latent, but e is only as large as s
        e = tl.fma(old, -b, tl.fma(x, -a, y))
        departure = tl.fma(v, -b, tl.fma(x, -a, y))
    elif t.old_mean is not None:
        x = load(t.sample, strides.sample, k, i, start, moving, T)
        y = load(t.prev_sample, strides.prev_sample, k, i, start, inside, T)
        m = load(t.old_mean, strides.old_mean, k, i, start, behaving, T)
        delta = mean(a, b, x, v) - m
        e = y - m
        departure = tl.fma(v, -b, tl.fma(x, -a, y))
    else:
        x = load(t.sample, strides.sample, k, i, start, moving, T)
        y = load(t.prev_sample, strides.prev_sample, k, i, start, moving, T)
        delta = mean(a, b, x, v) - y
        e = tl.zeros_like(delta)
        departure = tl.fma(v, -b, tl.fma(x, -a, y))
    return delta, e, departure
