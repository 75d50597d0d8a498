"""The fused loss in one launch: a grid of resident programs that wait for each other's sums."""

import triton
import triton.language as tl

from .evaluate import (
    Given,
    evaluate,
    independent_coefficients,
    load_coefficients,
    store_coefficients,
)
from .gradient import direction_of, put_resident_gradient, write_gradient
from .launch import COUNTS, POINTERS
from .sums import combine, is_last, segment_sums, store_partial, tile_of, tile_sums, totals
from .transition import TILE, step_coefficient

# Where grid_kernel's counters are. The first counts the grid's programs as they arrive; then come
# the grid's gate, its programs that leave, every row's programs that arrive, and every row's gate.
GATE = tl.constexpr(1)
DEPARTURES = tl.constexpr(2)
ROW = tl.constexpr(3)
GRID_COUNTERS = 3


@triton.jit
def open_gate(gate):
    """Lets the programs that wait at the gate go on; they see all that this one has written."""
    tl.debug_barrier()
    tl.atomic_xchg(gate, 1, sem="release")


@triton.jit
def wait_at(gate):
    seen = tl.atomic_add(gate, 0, sem="acquire")
    while seen == 0:
        seen = tl.atomic_add(gate, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def reset_gates(counters, rows):
    """Closes every gate for the next launch; the last program to leave calls it."""
    tl.store(counters + GATE, 0)
    for first in range(0, rows, 1024):
        row = first + tl.arange(0, 1024)
        tl.store(counters + ROW + rows + row, tl.zeros((1024,), tl.int32), mask=row < rows)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=POINTERS)
def grid_kernel(
    t,
    strides,
    table,
    table_c,
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
    counters,  # int32 [GRID_COUNTERS + 2 K B], 0 before and after
    advantages,
    old_log_prob,
    step_weights,
    elements,
    statistics,
    advantages_k,
    advantages_i,
    old_k,
    old_i,
    weights_k,
    weights_i,
    elements_k,
    elements_i,
    out,
    numbers,  # Numbers
    mode,
    written,  # [3, K B] float64: the coefficients of the gradient that is written
    grads,  # (cond, uncond) pointers, None where not wanted
    grad_strides,
    T: tl.constexpr,
    PADDED: tl.constexpr,
    STEPS: tl.constexpr,
    BATCH: tl.constexpr,
    RESIDENT: tl.constexpr,  # whether a segment is one tile, and every one has a program
    PER_ROW: tl.constexpr,  # whether a transition needs only its own sums
):
    """Persistent programs, which all run at once; each takes every num_programs-th segment.

    A program forms its segments' sums, waits at a gate, and writes the gradient. The gate is opened
    by the last program to arrive, which computes the coefficients: of the grid, or of the
    transition if PER_ROW. If RESIDENT, a program holds its tile in registers meanwhile and reads
    every operand once. Else it reads its segments again, from the last one back.
    """
    table_strides = (table_c, table_k, table_i)
    given = Given(advantages, old_log_prob, step_weights, elements, statistics)
    given_strides = Given(
        (advantages_k, advantages_i), (old_k, old_i), (weights_k, weights_i),
        (elements_k, elements_i), (0, 0),
    )  # fmt: skip
    rows = steps * batch
    units = rows * segments
    programs = tl.num_programs(0)
    for unit in range(tl.program_id(0), units, programs):
        segment, row = unit % segments, unit // segments
        k, i = tl.cast(row // batch, tl.int64), tl.cast(row % batch, tl.int64)
        if RESIDENT:
            start = tl.cast(segment, tl.int64) * TILE
            delta, e, departure, from_ref, b = tile_of(
                t, strides, table, table_strides, k, i, start, numel, guidance_scale, T
            )
            s1, s2, ref = tile_sums(t, delta, e, from_ref, b)
            s1, s2, ref = totals(t, s1, s2, ref)
            direction = direction_of(e, departure, mode)
        else:
            s1, s2, ref = segment_sums(
                t, strides, table, table_strides, k, i, segment, tiles, numel, guidance_scale, T
            )
        store_partial(partial, row, segment, rows, segments, s1, s2, ref)
        if PER_ROW:
            if is_last(counters + ROW + row, segments):
                if PADDED > 1:
                    combine(partial, sums, row, 1, rows, segments, PADDED)
                c1, c2, c3 = independent_coefficients(
                    sums, table, table_strides, given, given_strides, out, k, i, numel, steps,
                    batch, numbers, mode,
                )  # fmt: skip
                store_coefficients(written, row, rows, c1, c2, c3)
                open_gate(counters + ROW + rows + row)
        if RESIDENT:
            if not PER_ROW:
                if is_last(counters, programs):
                    if PADDED > 1:
                        combine(partial, sums, 0, rows, rows, segments, PADDED)
                    evaluate(
                        sums, table, table_strides, given, given_strides, out, numel, steps,
                        batch, numbers, mode, STEPS, BATCH,
                    )  # fmt: skip
                    open_gate(counters + GATE)
                wait_at(counters + GATE)
            else:
                wait_at(counters + ROW + rows + row)
            c1, c2, c3 = load_coefficients(written, row, rows)
            inside = tl.arange(0, TILE) < numel - start
            wide_b = step_coefficient(table, table_strides, 1, k, i)
            put_resident_gradient(
                t, strides, grads, grad_strides, k, i, start, inside, direction, from_ref, wide_b,
                c1, c2, c3, guidance_scale, T,
            )  # fmt: skip
    if not RESIDENT:
        if not PER_ROW:
            if is_last(counters, programs):
                if PADDED > 1:
                    combine(partial, sums, 0, rows, rows, segments, PADDED)
                evaluate(
                    sums, table, table_strides, given, given_strides, out, numel, steps,
                    batch, numbers, mode, STEPS, BATCH,
                )  # fmt: skip
                open_gate(counters + GATE)
            wait_at(counters + GATE)
        for back in range(tl.program_id(0), units, programs):
            unit = (units - 1 - tl.program_id(0)) // programs * programs
            unit = unit + tl.program_id(0) - (back - tl.program_id(0))
            segment, row = unit % segments, unit // segments
            k, i = tl.cast(row // batch, tl.int64), tl.cast(row % batch, tl.int64)
            if PER_ROW:
                wait_at(counters + ROW + rows + row)
            c1, c2, c3 = load_coefficients(written, row, rows)
            first = tl.cast(segment, tl.int64) * tiles * TILE
            for n in range(tiles):
                start = first + (tiles - 1 - n) * TILE
                if start < numel:
                    write_gradient(
                        t, strides, table, table_strides, grads, grad_strides, k, i, start,
                        c1, c2, c3, numel, guidance_scale, T,
                    )  # fmt: skip
    if is_last(counters + DEPARTURES, programs):
        if PER_ROW:
            evaluate(
                sums, table, table_strides, given, given_strides, out, numel, steps,
                batch, numbers, mode, STEPS, BATCH,
            )  # fmt: skip
        reset_gates(counters, rows)
