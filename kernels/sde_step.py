"""The rollout's step: mean, sample and ``sum((y - mean)^2)`` in one pass."""

import triton
import triton.language as tl
from torch import Tensor

from ..transitions import Transitions
from .launch import (
    COUNTS,
    POINTERS,
    WARPS,
    arguments,
    compute_type,
    counters,
    on_device,
    start,
    strides_of,
)
from .paths import cut
from .summation import sum_all
from .sums import combine, is_last, partial_sums, store_partial, tile_sum
from .transition import (
    TILE,
    counted,
    load,
    mean,
    noise_of,
    rounded,
    step_coefficient,
    store,
    velocity,
)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=POINTERS)
def sde_step_kernel(
    t,  # Operands: model_output, sample, noise or seed, and with guidance model_output_uncond
    strides,  # Operands: (over K, over B) of each
    table,  # [5, K, B] float64
    table_c,  # its strides
    table_k,
    table_i,
    guidance_scale,
    numel,
    steps,
    batch,
    segments,
    tiles,
    prev_sample,  # [K, B, D], dtype of the sample
    mean_out,  # [K, B, D] float32, or float64 if an operand is
    out_strides,  # (over K, over B) of both
    partial,  # [3, K B, segments] float64; the same memory as sums if segments is 1
    sums,  # [3, K B] float64; the second of the three is sum((y - mean)^2)
    counter,  # int32, 0 before and after
    T: tl.constexpr,
    PADDED: tl.constexpr,
):
    """One program per segment. Reads each operand once, writes sample and mean once."""
    table_strides = (table_c, table_k, table_i)
    segment, row = tl.program_id(0) % segments, tl.program_id(0) // segments
    k, i = (row // batch).to(tl.int64), (row % batch).to(tl.int64)
    a = step_coefficient(table, table_strides, 0, k, i).to(T)
    b = step_coefficient(table, table_strides, 1, k, i).to(T)
    s = step_coefficient(table, table_strides, 2, k, i).to(T)
    first = segment.to(tl.int64) * tiles * TILE
    square = tl.zeros((TILE // 4,), tl.float64)
    for tile in range(tiles):
        start = first + tile * TILE
        inside = tl.arange(0, TILE) < numel - start
        v = velocity(t, strides, k, i, start, inside, guidance_scale, T)
        x = load(t.sample, strides.sample, k, i, start, inside, T)
        mu = mean(a, b, x, v)
        noise = noise_of(t, strides, k, i, start, inside, T)
        y = rounded(tl.fma(noise, s, mu), prev_sample.dtype.element_ty)
        store(mean_out, out_strides, k, i, start, inside, mu)
        store(prev_sample, out_strides, k, i, start, inside, y)
        kept = inside
        if t.mask is not None:
            kept = counted(t, strides, k, i, start, inside)
        d = tl.where(kept, y.to(T) - mu, 0.0)  # log_prob is that of the rounded sample
        square += tile_sum(d * d)
    rows = steps * batch
    total = sum_all(square)
    store_partial(partial, row, segment, rows, segments, 0.0, total, 0.0)
    if PADDED > 1:
        if is_last(counter, rows * segments):
            combine(partial, sums, 0, rows, rows, segments, PADDED)


def sde_step(
    t: Transitions,
    prev_sample: Tensor,  # [K, B, D], to be written
    mean_out: Tensor,  # [K, B, D], to be written; its dtype is that of the arithmetic
) -> Tensor:
    """Launch :func:`sde_step_kernel`; returns ``sum((y - mean)^2)`` [K, B] float64."""
    steps, batch, numel = mean_out.shape
    parts = cut(steps, batch, numel)
    device = mean_out.device
    with on_device(device):
        sums = t.coefficients.new_empty((3, steps, batch))
        start(
            sde_step_kernel,
            parts.units,
            *arguments(t),
            parts.segments,
            parts.tiles,
            prev_sample,
            mean_out,
            strides_of(mean_out),
            partial_sums(sums, parts.segments),
            sums,
            counters(device, 1),
            compute_type(mean_out.dtype),
            parts.padded,
            warps=WARPS["sde_step"],
        )
    return sums[1].clone()
