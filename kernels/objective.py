"""The objective's scalars, line by line ``guard_ops/objective.py``, on float64 of any shape.

Names and order are those of ``csrc/objective.h``, which does the same in C++.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .expm1 import expm1

RATIO_NORM = ("none", "standardize", "closed_form")  # as GuardConfig's, by number
BALANCE = ("none", "inverse_ratio", "inverse_dt")
NONE = tl.constexpr(0)
STANDARDIZE = tl.constexpr(1)
CLOSED_FORM = tl.constexpr(2)
INVERSE_RATIO = tl.constexpr(1)
INVERSE_DT = tl.constexpr(2)


class Mode(NamedTuple):
    """Which objective: ``tl.constexpr`` each, for a kernel is compiled for one."""

    norm: Any  # index into RATIO_NORM
    balance: Any  # index into BALANCE
    detach_stats: Any
    mean_reduction: Any
    drop: Any
    gaussian: Any
    kl: Any  # whether kl_beta is not 0


LOG_SQRT_2PI = tl.constexpr(0.91893853320467274178)
LARGEST = tl.constexpr(1.7976931348623157e308)


@triton.jit
def is_finite(x):
    return tl.abs(x) <= LARGEST


@triton.jit
def scale_of(kappa, numel, mode):
    return kappa / numel if mode.mean_reduction else kappa


@triton.jit
def ratio_of(s1, s2, ref, advantage, old_log_prob, s, kappa, numel, mode):
    """``log r``, ``kl_old``, KL to the reference model, ``u = expm1(log r)``, whether finite."""
    scale = scale_of(kappa, numel, mode)
    kl = ref / (2 * s * s * numel)
    if old_log_prob is not None:
        log_prob = -scale * s2
        if mode.gaussian:
            constants = tl.log(s) + LOG_SQRT_2PI
            log_prob = log_prob - (constants if mode.mean_reduction else numel * constants)
        log_ratio = log_prob - old_log_prob
        kl_old = tl.zeros_like(log_ratio) + float("nan")
    else:
        log_ratio = scale * (2 * s1 - s2)
        kl_old = scale * s2
    u = expm1(log_ratio)
    finite = is_finite(log_ratio) & is_finite(advantage) & is_finite(u)
    if mode.kl:
        finite = finite & is_finite(kl)
    if mode.norm == CLOSED_FORM:
        finite = finite & is_finite(expm1(s * (log_ratio + kl_old)))
    return log_ratio, kl_old, kl, u, finite


@triton.jit
def denominator_of(std, target_std, std_floor):
    """The spread that RatioNorm divides by; a degenerate step's is ``target_std``."""
    return tl.where(std > std_floor, std, target_std)


@triton.jit
def excess_of(log_ratio, kl_old, u, s, mean, denominator, target_std, mode):
    """``r_hat - 1`` of a finite transition."""
    if mode.norm == CLOSED_FORM:
        excess = expm1(s * (log_ratio + kl_old))
    elif mode.norm == STANDARDIZE:
        excess = target_std * ((u - mean) / denominator)
    else:
        excess = u
    return excess


@triton.jit
def inverse_rho(excess, weight_floor):
    rho = 1.0 + excess
    return 1.0 / tl.where(rho < weight_floor, weight_floor, rho)


@triton.jit
def own_weight(dt, finite_steps, mode):
    """The balances that need no other step's ratio; of a sample's finite steps."""
    if mode.balance == INVERSE_DT:
        weight = 1.0 / (finite_steps * tl.abs(dt))
    else:
        weight = 1.0 / finite_steps
    return weight


@triton.jit
def surrogate_of(excess, advantage, clip_low, clip_high, adv_clip):
    """Loss, its slope in ``r_hat``, and whether clipped, past the upper and the lower bound."""
    a = tl.where(advantage < -adv_clip, -adv_clip, advantage)
    a = tl.where(a > adv_clip, adv_clip, a)
    high, low = excess > clip_high, excess < -clip_low
    clipped = ((a > 0) & high) | ((a < 0) & low)
    bounded = tl.where(high, clip_high, tl.where(low, -clip_low, excess))
    loss = -a * (1.0 + tl.where(clipped, bounded, excess))
    return loss, tl.where(clipped, 0.0, -a), clipped, high, low


@triton.jit
def coefficients_of(d_excess, d_u, excess, u, s, kappa, numel, transitions, kl_beta, finite, mode):
    """``d loss / d (S1, S2, reference sum)``; of a transition that is not finite 0, or NaN."""
    scale = scale_of(kappa, numel, mode)
    if mode.norm == CLOSED_FORM:
        c1 = d_excess * (1.0 + excess) * s * 2 * scale
        c2 = tl.zeros_like(c1)
    else:
        d_log_ratio = d_u * (1.0 + u)
        c1 = d_log_ratio * 2 * scale
        c2 = -d_log_ratio * scale
    c3 = tl.zeros_like(c1)
    if mode.kl:
        c3 = c3 + kl_beta / transitions / (2 * s * s * numel)
    other = 0.0 if mode.drop else float("nan")
    return tl.where(finite, c1, other), tl.where(finite, c2, other), tl.where(finite, c3, other)
