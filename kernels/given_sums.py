"""The [K, B] arithmetic of a loss alone, on sums that are given: a loss over ranks exchanges them.

Both kernels are one program, and read and write nothing but [K, B] and [K] numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import Objective
from ..transitions import Rows, Transitions
from .evaluate import (
    Given,
    Results,
    evaluate,
    mean_over,
    numel_of,
    ratios,
    spread_over,
    steps_at_once,
)
from .launch import COUNTS, POINTERS, WARPS, on_device, start, strides_of
from .objective import mode_of, numbers_of, rounding_gain
from .summation import sum_last
from .transition import step_coefficient

UNSPECIALIZED = ["numel", *COUNTS]


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=POINTERS)
def evaluate_kernel(
    sums,  # [3, K, B] float64
    table,  # [5, K, B] float64
    table_c,  # its strides
    table_k,
    table_i,
    numel,
    steps,
    batch,
    advantages,  # the pointers of Given, then its strides
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
    numbers,  # Numbers
    mode,  # Mode
    STEPS: tl.constexpr,
    BATCH: tl.constexpr,
    out,  # Results
):
    given = Given(advantages, old_log_prob, step_weights, elements, statistics)
    given_strides = Given(
        (advantages_k, advantages_i), (old_k, old_i), (weights_k, weights_i),
        (elements_k, elements_i), (0, 0),
    )  # fmt: skip
    evaluate(
        sums, table, (table_c, table_k, table_i), given, given_strides, out, numel, steps, batch,
        numbers, mode, STEPS, BATCH,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=POINTERS)
def ratio_statistics_kernel(
    sums,
    table,
    table_c,
    table_k,
    table_i,
    numel,
    steps,
    batch,
    advantages,
    old_log_prob,
    step_weights,
    elements,
    statistics,  # None
    advantages_k,
    advantages_i,
    old_k,
    old_i,
    weights_k,
    weights_i,
    elements_k,
    elements_i,
    numbers,
    mode,
    STEPS: tl.constexpr,
    BATCH: tl.constexpr,
    out,  # [5, K] float64
    WIDE: tl.constexpr,  # whether the loss's results are float64
):
    table_strides = (table_c, table_k, table_i)
    given = Given(advantages, old_log_prob, step_weights, elements, statistics)
    given_strides = Given(
        (advantages_k, advantages_i), (old_k, old_i), (weights_k, weights_i),
        (elements_k, elements_i), (0, 0),
    )  # fmt: skip
    i = tl.arange(0, BATCH)[None, :] + tl.zeros((STEPS, 1), tl.int32)
    step = tl.arange(0, STEPS)[:, None]
    for first in range(0, steps, STEPS):
        k = first + step + tl.zeros((STEPS, BATCH), tl.int32)
        inside = (k < steps) & (i < batch)
        k, i_at = tl.where(inside, k, 0), tl.where(inside, i, 0)
        width = numel_of(given, given_strides, k, i_at, inside, numel)
        _, _, _, u, finite, _, s, kappa = ratios(
            sums, table, table_strides, given, given_strides, k, i_at, k * batch + i_at, inside,
            steps, batch, width, numbers, mode, WIDE,
        )  # fmt: skip
        count = sum_last(tl.where(finite, 1.0, 0.0).to(tl.float64))
        mean, std = mean_over(u, finite, WIDE), spread_over(u, finite, WIDE)
        b = step_coefficient(table, table_strides, 1, k, i_at)
        gain = rounding_gain(b, s, kappa, width, mode)
        square = sum_last(tl.where(inside, gain * gain, 0.0))
        at, here = out + first + step, first + step < steps
        tl.store(at, count, mask=here)
        tl.store(at + steps, tl.where(count > 0, mean, 0.0), mask=here)
        tl.store(at + 2 * steps, tl.where(count > 0, std * tl.sqrt(count), 0.0), mask=here)
        tl.store(at + 3 * steps, square, mask=here)
        tl.store(at + 4 * steps, tl.cast(batch, tl.float64), mask=here)


def _start(
    kernel: Any, sums: Tensor, t: Transitions, rows: Rows, objective: Objective, *last: Any
) -> None:
    steps, batch, numel = t.latents.model_output.shape
    by_strides = (rows.advantages, rows.old_log_prob, rows.step_weights, rows.elements)
    with on_device(sums.device):
        start(
            kernel,
            1,
            sums.contiguous(),
            t.coefficients,
            *t.coefficients.stride(),
            numel,
            steps,
            batch,
            *rows,
            *(n for x in by_strides for n in strides_of(x)),
            numbers_of(objective),
            mode_of(objective),
            *steps_at_once(steps, batch),
            *last,
            warps=WARPS["given_sums"],
            programs=1,
        )


def evaluate_sums(
    sums: Tensor,  # [3, K, B] float64
    t: Transitions,
    rows: Rows,
    objective: Objective,
    loss: Tensor,  # []
    per_row: Tensor,  # [4, K, B]
    metrics: Tensor,  # [11, K]
    sum_grads: Tensor,  # [3, K, B] float64
) -> None:
    """Launch :func:`evaluate_kernel` to write the last four tensors."""
    spread = sums.new_empty(3 * sums.shape[1])
    results = Results(loss, per_row, metrics, sum_grads, spread)
    _start(evaluate_kernel, sums, t, rows, objective, results)


def ratio_statistics(
    sums: Tensor,  # [3, K, B] float64
    t: Transitions,
    rows: Rows,
    objective: Objective,
    out: Tensor,  # [5, K] float64
) -> None:
    """Launch :func:`ratio_statistics_kernel`."""
    wide = t.compute_dtype() == torch.float64
    rows = rows._replace(statistics=None)  # of which none is known
    _start(ratio_statistics_kernel, sums, t, rows, objective, out, wide)
