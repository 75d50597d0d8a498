"""The whole [K, B] objective in one program: ``guard_ops/objective.py``'s ``evaluate``, fused.

The program goes over the steps twice, ``STEPS`` at a time with the whole batch. First it forms the
ratios, their statistics and the excess; then each sample's finite steps are known, and it forms the
weights, the surrogate, the loss, ``d loss / d sums`` and the metrics. Everything is float64 and
summed in a fixed order.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..transitions import Rows
from .objective import (
    DROP,
    INVERSE_DT,
    INVERSE_RATIO,
    coefficients_of,
    fits,
    independent_weight,
    inverse_rho,
    is_finite,
    normalize,
    number,
    ratio_of,
    rounding_gain,
    std_floor_of,
    surrogate_of,
)
from .summation import sum_all, sum_first, sum_last
from .transition import group, step_coefficient

MAX_BATCH = 1024  # the most samples that one program holds at once
HELD = 1024  # transitions that it holds at once, unless one step has more


def steps_at_once(steps: int, batch: int) -> tuple[int, int]:
    """``STEPS`` and ``BATCH`` of :func:`evaluate`, which are powers of two."""
    padded = 1 << (batch - 1).bit_length()
    return min(1 << (steps - 1).bit_length(), max(1, HELD // padded)), padded


# The guard_ops.transitions.Rows of a call: either pointers, None where absent, or the strides of
# each over K and B.
Given = group("Given", Rows._fields)


class Results(NamedTuple):
    """The outputs, and what the first round over the steps keeps for the second."""

    loss: Any  # []
    per_row: Any  # [4, K, B]: log_ratio, excess, weights, kl
    metrics: Any  # [11, K]
    sum_grads: Any  # [3, K, B] float64
    spread: Any  # [3, K] float64 scratch: mean and std of u, std_floor


@triton.jit
def given_at(pointer, strides, k, i, mask):
    x = tl.load(pointer + k * strides[0] + i * strides[1], mask=mask, other=0.0)
    return x.to(tl.float64)


@triton.jit
def numel_of(given, strides, k, i, mask, numel):
    """D of transitions (k, i), float64: the latents' size, or how many elements a mask counts."""
    if given.elements is not None:
        at = given.elements + k * strides.elements[0] + i * strides.elements[1]
        width = tl.load(at, mask=mask, other=1.0).to(tl.float64)
    else:
        width = tl.cast(numel, tl.float64)
    return width


@triton.jit
def over(x, mask):
    """Mean of ``x`` over a step's samples where ``mask``, [STEPS, 1]; NaN if there are none."""
    return sum_last(tl.where(mask, x, 0.0)) / sum_last(tl.where(mask, 1.0, 0.0).to(tl.float64))


HUGE = tl.constexpr(2.0**500)
UNIT = tl.constexpr(2.0**600)  # a power of two, so that a division by it rounds nothing


@triton.jit
def unit_of(x, mask):
    """By what to divide a step's numbers so that no square or sum of them overflows, [STEPS, 1]."""
    largest = tl.max(tl.where(mask, tl.abs(x), 0.0), 1, keep_dims=True)
    return tl.where(largest > HUGE, UNIT, 1.0)


@triton.jit
def mean_over(x, mask, WIDE: tl.constexpr):
    """:func:`over` of ratios; only those of float64 results (WIDE) can overflow it."""
    if WIDE:
        unit = unit_of(x, mask)
        mean = over(x / unit, mask) * unit
    else:
        mean = over(x, mask)
    return mean


@triton.jit
def spread_over(x, mask, WIDE: tl.constexpr):
    """Standard deviation (correction 0) of ``x`` over a step's samples where ``mask``."""
    distance = x - mean_over(x, mask, WIDE)
    if WIDE:
        unit = unit_of(distance, mask)
        distance = distance / unit
        spread = tl.sqrt(over(distance * distance, mask)) * unit
    else:
        spread = tl.sqrt(over(distance * distance, mask))
    return spread


@triton.jit
def ratios(
    sums, table, table_strides, given, strides, k, i, n, inside, steps, batch, numel, numbers, mode,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Loads what :func:`ratio_of` needs of transitions (k, i), whose numbers are n, and calls it.

    A ratio that is finite may have no loss that a result can represent, for want of finite
    statistics or because its weight is too large; then it is not finite either. Statistics that are
    not formed yet make of no sample more than sqrt(batch) standard deviations.

    Also returns what it has loaded of them: the advantage, s and kappa.
    """
    rows = steps * batch
    s = tl.where(inside, step_coefficient(table, table_strides, 2, k, i), 1.0)
    kappa = step_coefficient(table, table_strides, 3, k, i)
    s1 = tl.load(sums + n, mask=inside, other=0.0, cache_modifier=".cg")
    s2 = tl.load(sums + rows + n, mask=inside, other=0.0, cache_modifier=".cg")
    ref = tl.load(sums + 2 * rows + n, mask=inside, other=0.0, cache_modifier=".cg")
    advantage = given_at(given.advantages, strides.advantages, k, i, inside)
    old = None
    if given.old_log_prob is not None:
        old = given_at(given.old_log_prob, strides.old_log_prob, k, i, inside)
    log_ratio, kl_old, kl, u, finite = ratio_of(
        s1, s2, ref, advantage, old, s, kappa, numel, numbers, mode, WIDE
    )
    # The weight, or what it is at most: how many of the steps are finite is not known yet.
    if given.step_weights is not None:
        weight = given_at(given.step_weights, strides.step_weights, k, i, inside)
        finite = finite & is_finite(weight)
    elif mode.balance == INVERSE_DT:
        weight = 1.0 / tl.abs(step_coefficient(table, table_strides, 4, k, i))
    else:
        weight = tl.zeros_like(s1) + 1.0
    if mode.statistics and given.statistics is None:
        spread = number(numbers.target_std)
        std_floor = number(numbers.std_floor)
        spread = tl.where(spread < std_floor, std_floor, spread)
        adv_clip = number(numbers.adv_clip)
        size = tl.where(tl.abs(advantage) < adv_clip, tl.abs(advantage), adv_clip)
        loss = size * (1.0 + spread * tl.sqrt(tl.cast(batch, tl.float64)))
    else:
        mean, std, floor = 0.0, 1.0, 0.0
        if mode.statistics:
            mean = tl.load(given.statistics + k, mask=inside, other=0.0)
            std = tl.load(given.statistics + steps + k, mask=inside, other=1.0)
            floor = tl.load(given.statistics + 2 * steps + k, mask=inside, other=0.0)
        excess, _, _, _ = normalize(log_ratio, kl_old, u, s, mean, std, floor, numbers, mode)
        loss, _, _, _, _ = surrogate_of(excess, advantage, numbers)
        finite = finite & fits(excess, WIDE)
    finite = finite & fits(loss * weight, WIDE)
    return log_ratio, kl_old, kl, u, finite & inside, advantage, s, kappa


@triton.jit
def normalize_finite(log_ratio, kl_old, u, finite, s, mean, std, floor, numbers, mode):
    """:func:`normalize`; the excess is NaN where a transition is not finite."""
    excess, outer, inner, by_std = normalize(
        tl.where(finite, log_ratio, 0.0), tl.where(finite, kl_old, 0.0), tl.where(finite, u, 0.0),
        s, mean, std, floor, numbers, mode,
    )  # fmt: skip
    return tl.where(finite, excess, float("nan")), outer, inner, by_std


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
def independent_coefficients(
    sums, table, table_strides, given, strides, out, k, i, numel, steps, batch, numbers, mode
):
    """A transition's coefficients, if no other's ratio enters them and all others are finite."""
    n = k * batch + i
    width = numel_of(given, strides, k, i, n >= 0, numel)
    WIDE: tl.constexpr = out.per_row.dtype.element_ty == tl.float64
    log_ratio, kl_old, _, u, finite, advantage, s, kappa = ratios(
        sums, table, table_strides, given, strides, k, i, n, n >= 0, steps, batch, width, numbers,
        mode, WIDE,
    )  # fmt: skip
    mean, std, floor = 0.0, 1.0, 0.0
    if mode.statistics:
        mean = tl.load(given.statistics + k)
        std = tl.load(given.statistics + steps + k)
        floor = tl.load(given.statistics + 2 * steps + k)
    excess, outer, inner, _ = normalize(log_ratio, kl_old, u, s, mean, std, floor, numbers, mode)
    if given.step_weights is not None:
        weight = given_at(given.step_weights, strides.step_weights, k, i, n >= 0)
    elif mode.balance == INVERSE_RATIO:
        weight = tl.full((), 1.0, tl.float64)  # there is only one step
    else:
        dt = step_coefficient(table, table_strides, 4, k, i)
        weight = independent_weight(dt, tl.cast(steps, tl.float64), mode)
    _, slope, _, _, _ = surrogate_of(excess, advantage, numbers)
    d_excess = weight * slope / tl.cast(batch, tl.float64)
    transitions = tl.cast(steps * batch, tl.float64)
    return coefficients_of(
        d_excess, outer, inner, s, kappa, width, transitions, finite, numbers, mode
    )


@triton.jit
def evaluate(
    sums,  # [3, K, B] float64
    table,  # [5, K, B] float64
    table_strides,
    given,  # Given: pointers
    strides,  # Given: strides
    out,  # Results
    numel,
    steps,
    batch,
    numbers,  # Numbers
    mode,  # Mode
    STEPS: tl.constexpr,
    BATCH: tl.constexpr,
):
    """Writes all :class:`Results`; one program runs it, when ``sums`` are complete."""
    rows = steps * batch
    i = tl.arange(0, BATCH)[None, :] + tl.zeros((STEPS, 1), tl.int32)
    step = tl.arange(0, STEPS)[:, None]
    WIDE: tl.constexpr = out.per_row.dtype.element_ty == tl.float64

    total = tl.zeros((BATCH,), tl.float64)  # sum of inverse rho over each sample's finite steps
    finite_steps = tl.zeros((BATCH,), tl.float64)
    for first in range(0, steps, STEPS):
        k = first + step + tl.zeros((STEPS, BATCH), tl.int32)
        inside = (k < steps) & (i < batch)
        k, i_at = tl.where(inside, k, 0), tl.where(inside, i, 0)
        n = k * batch + i_at
        width = numel_of(given, strides, k, i_at, inside, numel)
        log_ratio, kl_old, _, u, finite, _, s, kappa = ratios(
            sums, table, table_strides, given, strides, k, i_at, n, inside, steps, batch, width,
            numbers, mode, WIDE,
        )  # fmt: skip
        row = first + step
        mean, std = tl.zeros((STEPS, 1), tl.float64), tl.full((STEPS, 1), 1.0, tl.float64)
        floor = tl.zeros((STEPS, 1), tl.float64)
        if mode.statistics:
            here = row < steps
            if given.statistics is None:
                mean, std = mean_over(u, finite, WIDE), spread_over(u, finite, WIDE)
                b = step_coefficient(table, table_strides, 1, k, i_at)
                gain = rounding_gain(b, s, kappa, width, mode)
                floor = std_floor_of(over(gain * gain, inside), numbers)
            else:
                mean = tl.load(given.statistics + row, mask=here, other=0.0)
                std = tl.load(given.statistics + steps + row, mask=here, other=0.0)
                floor = tl.load(given.statistics + 2 * steps + row, mask=here, other=0.0)
            tl.store(out.spread + row, mean, mask=here)
            tl.store(out.spread + steps + row, std, mask=here)
            tl.store(out.spread + 2 * steps + row, floor, mask=here)
        excess, _, _, _ = normalize_finite(
            log_ratio, kl_old, u, finite, s, mean, std, floor, numbers, mode
        )
        tl.store(out.per_row + n, log_ratio.to(out.per_row.dtype.element_ty), mask=inside)
        total += sum_first(tl.where(finite, inverse_rho(excess, numbers), 0.0))
        finite_steps += sum_first(tl.where(finite, 1.0, 0.0).to(tl.float64))
    tl.debug_barrier()

    all_finite = sum_all(finite_steps)
    samples = tl.cast(batch, tl.float64)
    transitions = tl.cast(rows, tl.float64)
    if mode.nonfinite == DROP:
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
        width = numel_of(given, strides, k, i_at, inside, numel)
        log_ratio, kl_old, kl, u, finite, advantage, s, kappa = ratios(
            sums, table, table_strides, given, strides, k, i_at, n, inside, steps, batch, width,
            numbers, mode, WIDE,
        )  # fmt: skip
        row = first + step
        mean, std = tl.zeros((STEPS, 1), tl.float64), tl.full((STEPS, 1), 1.0, tl.float64)
        floor = tl.zeros((STEPS, 1), tl.float64)
        if mode.statistics:
            mean = tl.load(out.spread + row, mask=row < steps, other=0.0)
            std = tl.load(out.spread + steps + row, mask=row < steps, other=1.0)
            floor = tl.load(out.spread + 2 * steps + row, mask=row < steps, other=0.0)
        excess, outer, inner, by_std = normalize_finite(
            log_ratio, kl_old, u, finite, s, mean, std, floor, numbers, mode
        )
        if given.step_weights is not None:
            weight = given_at(given.step_weights, strides.step_weights, k, i_at, inside)
        elif mode.balance == INVERSE_RATIO:
            weight = inverse_rho(excess, numbers) / total[None, :]
        else:
            dt = step_coefficient(table, table_strides, 4, k, i_at)
            weight = independent_weight(dt, finite_steps[None, :], mode)
        weight = tl.where(finite, weight, 0.0)
        surrogate, slope, clipped, high, low = surrogate_of(excess, advantage, numbers)
        loss += sum_first(tl.where(finite, weight * surrogate, 0.0))
        kl_sum += sum_first(tl.where(finite, kl, 0.0))

        d_excess = tl.where(finite, weight * slope / samples, 0.0)
        if mode.statistics and not mode.detach_stats:  # the statistics have a gradient of their own
            distance = tl.where(std > 0, (u - mean) / std, 0.0)
            through_std = distance * over(d_excess * by_std, finite)
            d_excess = d_excess - over(d_excess, finite) - through_std
        c1, c2, c3 = coefficients_of(
            d_excess, outer, inner, s, kappa, width, transitions, finite, numbers, mode
        )
        tl.store(out.sum_grads + n, c1, mask=inside)
        tl.store(out.sum_grads + rows + n, c2, mask=inside)
        tl.store(out.sum_grads + 2 * rows + n, c3, mask=inside)

        narrow = out.per_row.dtype.element_ty
        tl.store(out.per_row + rows + n, excess.to(narrow), mask=inside)
        tl.store(out.per_row + 2 * rows + n, weight.to(narrow), mask=inside)
        tl.store(out.per_row + 3 * rows + n, kl.to(narrow), mask=inside)
        m, here = out.metrics + row, row < steps
        tl.store(m, mean_over(u, finite, WIDE).to(narrow), mask=here)
        tl.store(m + steps, spread_over(u, finite, WIDE).to(narrow), mask=here)
        tl.store(m + 2 * steps, mean_over(excess, finite, WIDE).to(narrow), mask=here)
        tl.store(m + 3 * steps, spread_over(excess, finite, WIDE).to(narrow), mask=here)
        tl.store(m + 4 * steps, over(clipped.to(tl.float64), finite).to(narrow), mask=here)
        tl.store(m + 5 * steps, over(high.to(tl.float64), finite).to(narrow), mask=here)
        tl.store(m + 6 * steps, over(low.to(tl.float64), finite).to(narrow), mask=here)
        tl.store(m + 7 * steps, over(kl_old, finite).to(narrow), mask=here)
        tl.store(m + 8 * steps, over(weight, finite).to(narrow), mask=here)
        bad = sum_last(tl.where(inside & (finite == 0), 1.0, 0.0).to(tl.float64))
        tl.store(m + 9 * steps, bad.to(narrow), mask=here)
        degenerate = tl.zeros((STEPS, 1), tl.float64)
        if mode.statistics:
            degenerate = tl.where(std <= floor, 1.0, 0.0)
        tl.store(m + 10 * steps, degenerate.to(narrow), mask=here)

    value = sum_all(loss) / samples
    if mode.kl:
        value += number(numbers.kl_beta) * (sum_all(kl_sum) / transitions)
    if mode.nonfinite != DROP:
        value = tl.where(all_finite < rows, float("nan"), value)
    tl.store(out.loss, value.to(out.loss.dtype.element_ty))
