"""The whole [K, B] objective in one program: ``guard_ops/objective.py``'s ``evaluate``, fused.

Steps are taken ``STEPS`` at a time with the whole batch beside them, twice: first the ratios, their
statistics and the excess; then, with each sample's finite steps known, weights, surrogate, loss,
``d loss / d sums`` and the metrics. Everything is float64 and summed in a fixed order.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .objective import (
    INVERSE_RATIO,
    STANDARDIZE,
    coefficients_of,
    denominator_of,
    excess_of,
    inverse_rho,
    own_weight,
    ratio_of,
    surrogate_of,
)
from .summation import sum_all, sum_first, sum_last
from .transition import step_coefficient

MAX_BATCH = 1024  # samples that one program holds beside each other
HELD = 1024  # transitions that it holds at once, if the batch is not larger


def steps_at_once(steps: int, batch: int) -> tuple[int, int]:
    """``STEPS`` and ``BATCH``, powers of two, for :func:`evaluate`."""
    padded = 1 << (batch - 1).bit_length()
    return min(1 << (steps - 1).bit_length(), max(1, HELD // padded)), padded


class Given(NamedTuple):
    """[K, B] float64 or float32 inputs, pointers (None where absent) or strides.

    ``mean_std`` is [2, K] float64.
    """

    advantages: Any
    old_log_prob: Any
    step_weights: Any
    mean_std: Any


class Results(NamedTuple):
    """Outputs, and float64 scratch between the two rounds."""

    loss: Any  # []
    per_row: Any  # [4, K, B]: log_ratio, excess, weights, kl
    metrics: Any  # [10, K]
    sum_grads: Any  # [3, K, B] float64
    excess: Any  # [K, B] float64 scratch
    spread: Any  # [2, K] float64 scratch: mean and std of u


@triton.jit
def given_at(pointer, strides, k, i, mask):
    x = tl.load(pointer + k * strides[0] + i * strides[1], mask=mask, other=0.0)
    return x.to(tl.float64)


@triton.jit
def over(x, mask):
    """Mean of ``x`` over a step's samples where ``mask``, [STEPS, 1]; NaN for none."""
    return sum_last(tl.where(mask, x, 0.0)) / sum_last(tl.where(mask, 1.0, 0.0).to(tl.float64))


@triton.jit
def spread_over(x, mask):
    """Standard deviation (correction 0) of ``x`` over a step's samples where ``mask``."""
    distance = x - over(x, mask)
    return tl.sqrt(over(distance * distance, mask))


@triton.jit
def ratios(sums, table, table_strides, given, strides, k, i, n, inside, rows, numel, mode):
    """:func:`ratio_of` of transitions (k, i), numbers n, with what else it needs of them."""
    s = tl.where(inside, step_coefficient(table, table_strides, 2, k, i), 1.0)
    kappa = step_coefficient(table, table_strides, 3, k, i)
    s1 = tl.load(sums + n, mask=inside, other=0.0, cache_modifier=".cg")
    s2 = tl.load(sums + rows + n, mask=inside, other=0.0, cache_modifier=".cg")
    ref = tl.load(sums + 2 * rows + n, mask=inside, other=0.0, cache_modifier=".cg")
    advantage = given_at(given.advantages, strides.advantages, k, i, inside)
    old = None
    if given.old_log_prob is not None:
        old = given_at(given.old_log_prob, strides.old_log_prob, k, i, inside)
    log_ratio, kl_old, kl, u, finite = ratio_of(s1, s2, ref, advantage, old, s, kappa, numel, mode)
    return log_ratio, kl_old, kl, u, finite & inside, advantage, s, kappa


@triton.jit
def store_coefficients(c, row, rows, c1, c2, c3):
    tl.store(c + row, c1)
    tl.store(c + rows + row, c2)
    tl.store(c + 2 * rows + row, c3)


@triton.jit
def load_coefficients(c, row, rows):
    c1 = tl.load(c + row, cache_modifier=".cg")
    c2 = tl.load(c + rows + row, cache_modifier=".cg")
    c3 = tl.load(c + 2 * rows + row, cache_modifier=".cg")
    return c1, c2, c3


@triton.jit
def own_coefficients(
    sums, table, table_strides, given, strides, k, i, numel, steps, batch, target_std, std_floor,
    clip_low, clip_high, adv_clip, kl_beta, mode,
):  # fmt: skip
    """A transition's coefficients where no other's ratio enters them and all others are finite."""
    rows = steps * batch
    n = k * batch + i
    width = tl.cast(numel, tl.float64)
    log_ratio, kl_old, _, u, finite, advantage, s, kappa = ratios(
        sums, table, table_strides, given, strides, k, i, n, n >= 0, rows, width, mode
    )
    mean, denominator = 0.0, 1.0
    if mode.norm == STANDARDIZE:
        mean = tl.load(given.mean_std + k)
        std = tl.load(given.mean_std + steps + k)
        denominator = denominator_of(std, target_std, std_floor)
    excess = excess_of(log_ratio, kl_old, u, s, mean, denominator, target_std, mode)
    if given.step_weights is not None:
        weight = given_at(given.step_weights, strides.step_weights, k, i, n >= 0)
    elif mode.balance == INVERSE_RATIO:
        weight = tl.full((), 1.0, tl.float64)  # one step
    else:
        dt = step_coefficient(table, table_strides, 4, k, i)
        weight = own_weight(dt, tl.cast(steps, tl.float64), mode)
    _, slope, _, _, _ = surrogate_of(excess, advantage, clip_low, clip_high, adv_clip)
    d_excess = weight * slope / tl.cast(batch, tl.float64)
    d_u = d_excess
    if mode.norm == STANDARDIZE:
        d_u = d_excess * (target_std / denominator)
    return coefficients_of(
        d_excess, d_u, excess, u, s, kappa, width, tl.cast(rows, tl.float64), kl_beta, finite, mode
    )


@triton.jit
def evaluate(
    sums,  # [3, K, B] float64
    table,  # [5, K, B] float64
    table_strides,
    given,  # Given: pointers
    strides,  # Given: (over K, over B) of each
    out,  # Results
    numel,
    steps,
    batch,
    target_std,
    std_floor,
    clip_low,
    clip_high,
    adv_clip,
    weight_floor,
    kl_beta,
    mode,  # Mode
    STEPS: tl.constexpr,
    BATCH: tl.constexpr,
):
    """Run by one program, when ``sums`` are complete."""
    rows = steps * batch
    i = tl.arange(0, BATCH)[None, :] + tl.zeros((STEPS, 1), tl.int32)
    step = tl.arange(0, STEPS)[:, None]
    width = tl.cast(numel, tl.float64)

    total = tl.zeros((BATCH,), tl.float64)  # of inverse rho over a sample's finite steps
    finite_steps = tl.zeros((BATCH,), tl.float64)
    for first in range(0, steps, STEPS):
        k = first + step + tl.zeros((STEPS, BATCH), tl.int32)
        inside = (k < steps) & (i < batch)
        k, i_at = tl.where(inside, k, 0), tl.where(inside, i, 0)
        n = k * batch + i_at
        log_ratio, kl_old, _, u, finite, _, s, _ = ratios(
            sums, table, table_strides, given, strides, k, i_at, n, inside, rows, width,
            mode,
        )  # fmt: skip
        row = first + step
        mean, denominator = tl.zeros((STEPS, 1), tl.float64), tl.full((STEPS, 1), 1.0, tl.float64)
        if mode.norm == STANDARDIZE:
            if given.mean_std is None:
                mean, std = over(u, finite), spread_over(u, finite)
            else:
                mean = tl.load(given.mean_std + row, mask=row < steps, other=0.0)
                std = tl.load(given.mean_std + steps + row, mask=row < steps, other=0.0)
            denominator = denominator_of(std, target_std, std_floor)
            tl.store(out.spread + row, mean, mask=row < steps)
            tl.store(out.spread + steps + row, std, mask=row < steps)
        safe = tl.where(finite, log_ratio, 0.0)
        excess = excess_of(
            safe, tl.where(finite, kl_old, 0.0), tl.where(finite, u, 0.0), s, mean, denominator,
            target_std, mode,
        )  # fmt: skip
        excess = tl.where(finite, excess, float("nan"))
        tl.store(out.excess + n, excess, mask=inside)
        tl.store(out.per_row + n, log_ratio.to(out.per_row.dtype.element_ty), mask=inside)
        total += sum_first(tl.where(finite, inverse_rho(excess, weight_floor), 0.0))
        finite_steps += sum_first(tl.where(finite, 1.0, 0.0).to(tl.float64))
    tl.debug_barrier()

    all_finite = sum_all(finite_steps)
    samples = tl.cast(batch, tl.float64)
    transitions = tl.cast(rows, tl.float64)
    if mode.drop:
        samples = sum_all(tl.where(finite_steps > 0, 1.0, 0.0).to(tl.float64))
        samples = tl.where(samples > 0, samples, 1.0)
        transitions = tl.where(all_finite > 0, all_finite, 1.0)

    loss = tl.zeros((BATCH,), tl.float64)
    kl_sum = tl.zeros((BATCH,), tl.float64)
    for first in range(0, steps, STEPS):
        k = first + step + tl.zeros((STEPS, BATCH), tl.int32)
        inside = (k < steps) & (i < batch)
        k, i_at = tl.where(inside, k, 0), tl.where(inside, i, 0)
        n = k * batch + i_at
        log_ratio, kl_old, kl, u, finite, advantage, s, kappa = ratios(
            sums, table, table_strides, given, strides, k, i_at, n, inside, rows, width,
            mode,
        )  # fmt: skip
        excess = tl.load(out.excess + n, mask=inside, other=0.0)
        if given.step_weights is not None:
            weight = given_at(given.step_weights, strides.step_weights, k, i_at, inside)
        elif mode.balance == INVERSE_RATIO:
            weight = inverse_rho(excess, weight_floor) / total[None, :]
        else:
            dt = step_coefficient(table, table_strides, 4, k, i_at)
            weight = own_weight(dt, finite_steps[None, :], mode)
        weight = tl.where(finite, weight, 0.0)
        surrogate, slope, clipped, high, low = surrogate_of(
            excess, advantage, clip_low, clip_high, adv_clip
        )
        loss += sum_first(tl.where(finite, weight * surrogate, 0.0))
        kl_sum += sum_first(tl.where(finite, kl, 0.0))

        d_excess = tl.where(finite, weight * slope / samples, 0.0)
        d_u = d_excess
        row = first + step
        if mode.norm == STANDARDIZE:
            mean = tl.load(out.spread + row, mask=row < steps, other=0.0)
            std = tl.load(out.spread + steps + row, mask=row < steps, other=1.0)
            if not mode.detach_stats:  # the statistics' own gradients
                z = tl.where(std > std_floor, (u - mean) / std, 0.0)
                d_u = d_excess - over(d_excess, finite) - z * over(d_excess * z, finite)
            d_u = d_u * (target_std / denominator_of(std, target_std, std_floor))
        c1, c2, c3 = coefficients_of(
            d_excess, d_u, excess, u, s, kappa, width, transitions, kl_beta, finite,
            mode,
        )  # fmt: skip
        tl.store(out.sum_grads + n, c1, mask=inside)
        tl.store(out.sum_grads + rows + n, c2, mask=inside)
        tl.store(out.sum_grads + 2 * rows + n, c3, mask=inside)

        narrow = out.per_row.dtype.element_ty
        tl.store(out.per_row + rows + n, excess.to(narrow), mask=inside)
        tl.store(out.per_row + 2 * rows + n, weight.to(narrow), mask=inside)
        tl.store(out.per_row + 3 * rows + n, kl.to(narrow), mask=inside)
        m, here = out.metrics + row, row < steps
        tl.store(m, over(u, finite).to(narrow), mask=here)
        tl.store(m + steps, spread_over(u, finite).to(narrow), mask=here)
        tl.store(m + 2 * steps, over(excess, finite).to(narrow), mask=here)
        tl.store(m + 3 * steps, spread_over(excess, finite).to(narrow), mask=here)
        tl.store(m + 4 * steps, over(clipped.to(tl.float64), finite).to(narrow), mask=here)
        tl.store(m + 5 * steps, over(high.to(tl.float64), finite).to(narrow), mask=here)
        tl.store(m + 6 * steps, over(low.to(tl.float64), finite).to(narrow), mask=here)
        tl.store(m + 7 * steps, over(kl_old, finite).to(narrow), mask=here)
        tl.store(m + 8 * steps, over(weight, finite).to(narrow), mask=here)
        bad = sum_last(tl.where(inside & (finite == 0), 1.0, 0.0).to(tl.float64))
        tl.store(m + 9 * steps, bad.to(narrow), mask=here)

    value = sum_all(loss) / samples
    if mode.kl:
        value += kl_beta * (sum_all(kl_sum) / transitions)
    if not mode.drop:
        value = tl.where(all_finite < rows, float("nan"), value)
    tl.store(out.loss, value.to(out.loss.dtype.element_ty))
