"""The fused loss in its three paths; ``paths.py`` says when which is taken.

- ``two_launches``: :func:`sums_then_evaluate_kernel`, then ``gradient_kernel``.
- ``one_launch``: :func:`grid_kernel`, whose programs are all resident and wait for each other.
- ``rows``: :func:`rows_kernel`, one program per transition, if that needs only its own sums.

All three give the same bits. Only in ``grid_kernel`` do programs wait for others. It is launched
cooperatively, so that all of them run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import CHOICES, Objective
from ..transitions import Rows, Transitions
from .evaluate import (
    Given,
    Results,
    evaluate,
    independent_coefficients,
    steps_at_once,
    store_coefficients,
)
from .gradient import direction_of, gradient, put_resident_gradient, write_gradient
from .grid import GRID_COUNTERS, grid_kernel
from .launch import (
    COUNTS,
    POINTERS,
    WARPS,
    arguments,
    compute_type,
    counters,
    on_device,
    start,
    start_tuned,
    strides_of,
)
from .objective import mode_of, numbers_of
from .paths import choose, cut, machine, refused
from .sums import (
    combine,
    is_last,
    partial_sums,
    segment_sums,
    store_partial,
    tile_of,
    tile_sums,
    totals,
    tuning_key,
)
from .transition import TILE, step_coefficient


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=POINTERS)
def sums_then_evaluate_kernel(
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
    counters,  # int32, 0 before and after
    # The pointers of Given, then its strides. These are arguments of their own instead of tuples,
    # so that COUNTS keeps Triton from compiling for their values.
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
    out,  # Results
    numbers,  # Numbers
    mode,  # Mode
    T: tl.constexpr,
    PADDED: tl.constexpr,
    STEPS: tl.constexpr,
    BATCH: tl.constexpr,
):
    """One program per segment forms its sums; the last to arrive does the [K, B] arithmetic.

    Reads every operand once.
    """
    table_strides = (table_c, table_k, table_i)
    given = Given(advantages, old_log_prob, step_weights, elements, statistics)
    given_strides = Given(
        (advantages_k, advantages_i), (old_k, old_i), (weights_k, weights_i),
        (elements_k, elements_i), (0, 0),
    )  # fmt: skip
    segment, row = tl.program_id(0) % segments, tl.program_id(0) // segments
    k, i = (row // batch).to(tl.int64), (row % batch).to(tl.int64)
    s1, s2, ref = segment_sums(
        t, strides, table, table_strides, k, i, segment, tiles, numel, guidance_scale, T
    )
    rows = steps * batch
    store_partial(partial, row, segment, rows, segments, s1, s2, ref)
    if is_last(counters, rows * segments):
        if PADDED > 1:
            combine(partial, sums, 0, rows, rows, segments, PADDED)
        evaluate(
            sums, table, table_strides, given, given_strides, out, numel, steps,
            batch, numbers, mode, STEPS, BATCH,
        )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=POINTERS)
def rows_kernel(
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
    counters,  # int32, 0 before and after
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
    RESIDENT: tl.constexpr,  # whether a row is one tile
):
    """One program per transition: its sums, coefficients, and gradient from the last tile back.

    Reads every operand once if a row is one tile, else twice, the second time from cache, and
    writes the gradient. The coefficients assume that every other transition is finite.
    """
    table_strides = (table_c, table_k, table_i)
    given = Given(advantages, old_log_prob, step_weights, elements, statistics)
    given_strides = Given(
        (advantages_k, advantages_i), (old_k, old_i), (weights_k, weights_i),
        (elements_k, elements_i), (0, 0),
    )  # fmt: skip
    row = tl.program_id(0)
    k, i = (row // batch).to(tl.int64), (row % batch).to(tl.int64)
    rows = steps * batch
    zero = tl.full((), 0, tl.int64)
    if RESIDENT:
        delta, e, departure, from_ref, b = tile_of(
            t, strides, table, table_strides, k, i, zero, numel, guidance_scale, T
        )
        s1, s2, ref = tile_sums(t, delta, e, from_ref, b)
        s1, s2, ref = totals(t, s1, s2, ref)
        direction = direction_of(e, departure, mode)
        store_partial(partial, row, 0, rows, segments, s1, s2, ref)
    else:
        for segment in range(segments):
            s1, s2, ref = segment_sums(
                t, strides, table, table_strides, k, i, segment, tiles, numel, guidance_scale, T
            )
            store_partial(partial, row, segment, rows, segments, s1, s2, ref)
    tl.debug_barrier()
    if PADDED > 1:
        combine(partial, sums, row, 1, rows, segments, PADDED)
    c1, c2, c3 = independent_coefficients(
        sums, table, table_strides, given, given_strides, out, k, i, numel, steps, batch,
        numbers, mode,
    )  # fmt: skip
    store_coefficients(written, row, rows, c1, c2, c3)
    if RESIDENT:
        inside = tl.arange(0, TILE) < numel
        b = step_coefficient(table, table_strides, 1, k, i)
        put_resident_gradient(
            t, strides, grads, grad_strides, k, i, zero, inside, direction, from_ref, b, c1, c2, c3,
            guidance_scale, T,
        )  # fmt: skip
    else:
        count = tl.cdiv(tl.cast(numel, tl.int64), TILE)
        for n in range(count):
            write_gradient(
                t, strides, table, table_strides, grads, grad_strides, k, i,
                (count - 1 - n) * TILE, c1, c2, c3, numel, guidance_scale, T,
            )  # fmt: skip
    if is_last(counters, rows):
        evaluate(
            sums, table, table_strides, given, given_strides, out, numel, steps,
            batch, numbers, mode, STEPS, BATCH,
        )  # fmt: skip


def independent(rows: Rows, objective: Objective, steps: int) -> bool:
    """Whether a transition's gradient needs only its own sums, if all others are finite."""
    balance = CHOICES["balance"][objective.chosen()["balance"]]
    ratios = not objective.needs().statistics or rows.statistics is not None
    weights = balance != "inverse_ratio" or steps == 1 or rows.step_weights is not None
    return ratios and weights


def others_count(rows: Rows, objective: Objective, steps: int) -> bool:
    """Whether an :func:`independent` transition's gradient changes if another is not finite."""
    drop = CHOICES["nonfinite"][objective.chosen()["nonfinite"]] == "drop"
    return drop or (steps > 1 and rows.step_weights is None)


def guard_loss(
    t: Transitions,
    rows: Rows,
    objective: Objective,
    grad: Tensor | None,  # like model_output
    grad_uncond: Tensor | None,  # like model_output_uncond
    loss: Tensor,  # []
    per_row: Tensor,  # [4, K, B]
    metrics: Tensor,  # [10, K]
    sum_grads: Tensor,  # [3, K, B] float64
    path: str | None = None,
) -> None:
    """Launch ``path``, or the one that :mod:`.paths` chooses, to write the six tensors."""
    v = t.latents.model_output
    (steps, batch, numel), device = v.shape, v.device
    parts = cut(steps, batch, numel)
    alone = independent(rows, objective, steps)
    row_bytes = numel * sum(x.element_size() for x in t.latents.present())
    path = path or choose(machine(device), parts, row_bytes, alone)
    if grad is None and grad_uncond is None:
        path = "two_launches"
    with on_device(device):
        sums = torch.empty_like(sum_grads)
        spread = sums.new_empty(3 * steps)
        count = GRID_COUNTERS + 2 * parts.rows if path == "one_launch" else 1
        by_strides = (rows.advantages, rows.old_log_prob, rows.step_weights, rows.elements)
        common = (
            *arguments(t),
            parts.segments,
            parts.tiles,
            partial_sums(sums, parts.segments),
            sums,
            counters(device, count),
            *rows,
            *(n for x in by_strides for n in strides_of(x)),
            Results(loss, per_row, metrics, sum_grads, spread),
            numbers_of(objective),
            mode_of(objective),
        )
        constants = (compute_type(t.compute_dtype()), parts.padded, *steps_at_once(steps, batch))
        if path == "two_launches":

            def launch(warps: int) -> None:
                start(sums_then_evaluate_kernel, parts.units, *common, *constants, warps=warps)

            start_tuned("sums", tuning_key(t), launch)
            gradient(t, sum_grads, grad, grad_uncond)
            return
        grads = (grad, grad_uncond)
        written = torch.empty_like(sum_grads) if alone else sum_grads
        last = (written, grads, tuple(map(strides_of, grads)), *constants)
        if path == "rows":
            start(rows_kernel, parts.rows, *common, *last, parts.one_tile, warps=WARPS["rows"])
        else:
            programs = machine(device).processors
            resident = parts.tiles == 1 and parts.units <= programs
            try:
                start(
                    grid_kernel,
                    min(parts.units, programs),
                    *common,
                    *last,
                    resident,
                    alone,
                    warps=WARPS["grid"],
                    programs=1,
                    **({} if device.type == "cpu" else {"launch_cooperative_grid": True}),
                )
            except RuntimeError as error:
                if not refused(device, error):
                    raise
                results = loss, per_row, metrics, sum_grads
                guard_loss(t, rows, objective, grad, grad_uncond, *results, path="two_launches")
                return
        if alone and others_count(rows, objective, steps):
            gradient(t, sum_grads, grad, grad_uncond, written=written)
