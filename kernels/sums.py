"""``S1, S2`` and the reference sum of every transition; the fused loss's first pass.

Only a row's length decides how it is cut into segments (:func:`cut`). Each segment is added up in a
fixed order, and so are the segments. The last program to arrive adds those up and, in the fused
loss, does the [K, B] arithmetic, so that this takes no launch of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..transitions import Transitions
from .launch import (
    COUNTS,
    POINTERS,
    arguments,
    compute_type,
    counters,
    on_device,
    start,
    start_tuned,
)
from .paths import cut
from .summation import halve, sum_all, sum_last
from .transition import TILE, counted, differences, load, step_coefficient, velocity

COMBINED = tl.constexpr(2048)  # partial sums that are added up at once


@triton.jit
def tile_sum(x):
    """[TILE] products -> [TILE / 4] float64: four neighbours are added before they are widened."""
    return halve(halve(x)).to(tl.float64)


@triton.jit
def tile_of(t, strides, table, table_strides, k, i, start, numel, guidance_scale, T: tl.constexpr):
    """A tile's :func:`differences`, ``v - v_ref`` (or v) and b. Reads every operand once."""
    a = step_coefficient(table, table_strides, 0, k, i).to(T)
    b = step_coefficient(table, table_strides, 1, k, i).to(T)
    s = step_coefficient(table, table_strides, 2, k, i).to(T)
    inside = tl.arange(0, TILE) < numel - start
    v = velocity(t, strides, k, i, start, inside, guidance_scale, T)
    delta, e, departure = differences(
        t, strides, k, i, start, inside, inside, inside, v, a, b, s, T
    )
    from_ref = v
    if t.ref_model_output is not None:
        r = load(t.ref_model_output, strides.ref_model_output, k, i, start, inside, T)
        from_ref = v - r
    if t.mask is not None:
        kept = counted(t, strides, k, i, start, inside)
        delta, e = tl.where(kept, delta, 0.0), tl.where(kept, e, 0.0)
        from_ref = tl.where(kept, from_ref, 0.0)
    return delta, e, departure, from_ref, b


@triton.jit
def tile_sums(t, delta, e, from_ref, b):
    """[TILE / 4] float64 terms of the three sums."""
    ref = tl.zeros((TILE // 4,), tl.float64)
    if t.ref_model_output is not None:
        drift = b * from_ref
        ref = tile_sum(drift * drift)
    return tile_sum(delta * e), tile_sum(delta * delta), ref


@triton.jit
def totals(t, s1, s2, ref):
    """Adds up the terms of the three sums, each to a float64 scalar."""
    total = tl.full((), 0.0, tl.float64)
    if t.ref_model_output is not None:
        total = sum_all(ref)
    return sum_all(s1), sum_all(s2), total


@triton.jit
def segment_sums(
    t, strides, table, table_strides, k, i, segment, tiles, numel, guidance_scale, T: tl.constexpr
):
    """One segment's three sums, float64 scalars. Reads every operand once."""
    first = tl.cast(segment, tl.int64) * tiles * TILE
    s1 = tl.zeros((TILE // 4,), tl.float64)
    s2 = tl.zeros((TILE // 4,), tl.float64)
    ref = tl.zeros((TILE // 4,), tl.float64)
    for tile in range(tiles):
        delta, e, _, from_ref, b = tile_of(
            t, strides, table, table_strides, k, i, first + tile * TILE, numel, guidance_scale, T
        )
        d1, d2, d3 = tile_sums(t, delta, e, from_ref, b)
        s1 += d1
        s2 += d2
        ref += d3
    return totals(t, s1, s2, ref)


@triton.jit
def store_partial(partial, row, segment, rows, segments, s1, s2, ref):
    """Writes a segment's sums into ``partial`` [3, rows, segments]."""
    at = row.to(tl.int64) * segments + segment
    plane = tl.cast(rows, tl.int64) * segments
    tl.store(partial + at, s1)
    tl.store(partial + plane + at, s2)
    tl.store(partial + 2 * plane + at, ref)


@triton.jit
def combine(partial, sums, first, count, rows, segments, PADDED: tl.constexpr):
    """``sums`` [3, rows] of rows ``[first, first + count)`` from ``partial`` [3, rows, segments].

    PADDED: the smallest power of two that is not below ``segments``. The loads bypass the
    first-level cache, which may hold older values of what other programs have written.
    """
    GROUP: tl.constexpr = COMBINED // PADDED
    segment = tl.arange(0, PADDED)[None, :]
    for group in range(0, count, GROUP):
        row = first + group + tl.arange(0, GROUP)
        inside = row < first + count
        at = row.to(tl.int64)[:, None] * segments + segment
        mask = inside[:, None] & (segment < segments)
        for plane in tl.static_range(3):
            base = partial + tl.cast(plane * rows, tl.int64) * segments
            x = tl.load(base + at, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(sums + plane * rows + row, tl.reshape(sum_last(x), (GROUP,)), mask=inside)
    tl.debug_barrier()


@triton.jit
def is_last(counter, expected):
    """Counts this program; returns whether it is the last of ``expected``, and resets if it is."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == expected - 1
    if last:
        tl.atomic_xchg(counter, 0, sem="relaxed")
    return last


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=POINTERS)
def sums_kernel(
    t,  # Operands: pointers
    strides,  # Operands: (over K, over B) of each
    table,  # [5, K, B] float64
    table_c,  # its strides
    table_k,
    table_i,
    guidance_scale: tl.float64,
    numel,
    steps,
    batch,
    segments,
    tiles,
    partial,  # [3, K B, segments] float64; the same memory as sums if segments is 1
    sums,  # [3, K B] float64
    counter,  # int32, 0 before and after
    T: tl.constexpr,
    PADDED: tl.constexpr,
):
    """One program per segment. Reads every operand once, writes three numbers per segment."""
    table_strides = (table_c, table_k, table_i)
    segment, row = tl.program_id(0) % segments, tl.program_id(0) // segments
    k, i = (row // batch).to(tl.int64), (row % batch).to(tl.int64)
    s1, s2, ref = segment_sums(
        t, strides, table, table_strides, k, i, segment, tiles, numel, guidance_scale, T
    )
    rows = steps * batch
    store_partial(partial, row, segment, rows, segments, s1, s2, ref)
    if PADDED > 1:
        if is_last(counter, rows * segments):
            combine(partial, sums, 0, rows, rows, segments, PADDED)


def partial_sums(sums: Tensor, segments: int) -> Tensor:
    """Memory for the segments' sums [3, K B, segments], which is ``sums`` if segments is 1."""
    return sums if segments == 1 else sums.new_empty(segments * sums.numel())


def sums(t: Transitions, out: Tensor) -> None:
    """Launch :func:`sums_kernel`; out: [3, K, B] float64."""
    parts, device = cut(*t.latents.model_output.shape), t.latents.model_output.device
    with on_device(device):
        partial = partial_sums(out, parts.segments)
        last = (parts.segments, parts.tiles, partial, out, counters(device, 1))
        constants = (compute_type(t.compute_dtype()), parts.padded)

        def launch(warps: int) -> None:
            start(sums_kernel, parts.units, *arguments(t), *last, *constants, warps=warps)

        start_tuned("sums", tuning_key(t), launch)


def tuning_key(t: Transitions) -> tuple[object, ...]:
    """Row length, rows, dtypes and device: what a launch configuration may depend on."""
    dtypes = tuple(None if x is None else x.dtype for x in (*t.latents, t.seed))
    v = t.latents.model_output
    return (*v.shape, dtypes, torch.device(v.device))
