"""The objective on [K, B] numbers: the sums of each transition come in, the loss comes out.

It is plain differentiable PyTorch in float64. Fused kernels follow it line by line and are tested
against it; the ``reference`` backend runs it. Ratios are handled as differences from 1 throughout:
``u = expm1(log r)``, ``excess = r_hat - 1``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .config import RATIO_NORMS, GuardConfig
from .schedule import StepCoefficients

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


class Metrics(NamedTuple):
    """Per-step diagnostics, each [K] ([] for one step), over the finite transitions of the step."""

    ratio_bias: Tensor  # mean(r) - 1
    ratio_std: Tensor  # std(r), correction 0
    ratio_hat_bias: Tensor  # mean(r_hat) - 1
    ratio_hat_std: Tensor
    clip_fraction: Tensor  # share whose clipped branch is the active one
    clip_fraction_high: Tensor  # share with excess > clip_high, whatever the advantage
    clip_fraction_low: Tensor  # share with excess < -clip_low, whatever the advantage
    kl_old: Tensor  # mean KL(old || new); NaN in the log-prob form, which cannot know it
    grad_weight: Tensor  # mean balance weight
    nonfinite: Tensor  # how many transitions were not finite
    degenerate: Tensor  # 1 where std(r) is at most std_floor, so that nothing was divided by it


class Evaluation(NamedTuple):
    """What :func:`evaluate` returns; all but ``loss`` are detached."""

    loss: Tensor  # []
    excess: Tensor  # [K, B] r_hat - 1
    weights: Tensor  # [K, B]
    metrics: Metrics


def log_ratio_and_kl(
    sums: Tensor,  # [3, K, B]: S1, S2 and the reference model's sum
    coeffs: StepCoefficients,  # [K, B]
    numel: int | Tensor,  # D: of all transitions, or [K, B]
    reduction: str,
    old_log_prob: Tensor | None = None,  # [K, B]: log-prob form
) -> tuple[Tensor, Tensor, Tensor]:
    """``log r``, ``kl_old`` and the KL to the reference model, each [K, B].

    ``log r = kappa/D (2 S1 - S2)``, ``kl_old = kappa/D S2``; in the log-prob form S2 is the sum of
    ``(mean - y)^2``, so ``log r = -kappa/D S2 - log s - log sqrt(2 pi) - old_log_prob`` and the KL
    is not known (NaN).
    """
    s1, s2, ref = sums.unbind(0)
    scale = coeffs.kappa / numel if reduction == "mean" else coeffs.kappa
    kl = ref / (2 * coeffs.s**2 * numel)
    if old_log_prob is None:
        return scale * (2 * s1 - s2), scale * s2, kl
    log_ratio = log_density(-scale * s2, coeffs, numel, reduction) - old_log_prob
    return log_ratio, torch.full_like(s2, math.nan), kl


def log_density(
    exponent: Tensor, coeffs: StepCoefficients, numel: int | Tensor, reduction: str
) -> Tensor:
    """``exponent - log s - log sqrt(2 pi)``; "sum" has both constants D times, cps has neither."""
    if not coeffs.gaussian:
        return exponent
    constants = torch.log(coeffs.s) + LOG_SQRT_2PI
    return exponent - (constants if reduction == "mean" else numel * constants)


def largest(dtype: torch.dtype) -> float:
    """The largest number of results of this dtype, which are at least float32.

    What exceeds it cannot be represented in a result, and so counts as not finite.
    """
    return torch.finfo(torch.promote_types(dtype, torch.float32)).max


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``x`` [K, B] over the batch where ``mask``; NaN for a step without such a sample.

    Neither the sum nor, in :func:`masked_std`, a square overflows, up to half the largest number.
    """
    x = torch.where(mask, x, 0.0)
    unit = _unit(x)
    return (x / unit.unsqueeze(-1)).sum(-1) / mask.sum(-1) * unit


def masked_std(x: Tensor, mask: Tensor) -> Tensor:
    """Standard deviation (correction 0) of ``x`` [K, B] over the batch where ``mask``."""
    variance, unit = _variance(x, masked_mean(x, mask), mask)
    return variance.sqrt() * unit


def moments(u: Tensor, finite: Tensor) -> Tensor:
    """Count, mean and ``root_m2 = std sqrt(count)`` of ``u`` [K, B] where ``finite``, [3, K].

    0, 0 and 0 for a step without a finite sample, so that it adds nothing to another's.
    """
    count = finite.sum(-1).double()
    mean = torch.where(count > 0, masked_mean(u, finite), 0.0)
    std = torch.where(count > 0, masked_std(u, finite), 0.0)
    return torch.stack([count, mean, std * count.sqrt()])


def std_of(count: Tensor, root_m2: Tensor) -> Tensor:
    """The standard deviation of :func:`moments`; 0 without samples."""
    return root_m2 / count.clamp(min=torch.finfo(torch.float64).tiny).sqrt()


def ratio_statistics(
    log_ratio: Tensor,  # [K, B]
    finite: Tensor,  # [K, B] bool
    square: Tensor,  # [K, B] of :func:`squared_gain`
) -> Tensor:
    """What RatioNorm has to know of each step, to be merged with other ranks', [5, K] float64.

    :func:`moments` of the finite ``u = expm1(log r)``; then the sum of the squared gain over all
    the step's transitions, and of how many that is a sum.
    """
    u = torch.expm1(torch.where(finite, log_ratio, 0.0).double())
    over_all = torch.stack([square.sum(-1), torch.full_like(square[:, 0], square.shape[-1])])
    return torch.cat([moments(u, finite), over_all])


def _variance(x: Tensor, mean: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The variance [K] of ``x`` in squares of a unit, and that unit [K]."""
    distance = torch.where(mask, x - mean.unsqueeze(-1), 0.0)
    unit = _unit(distance)
    return masked_mean((distance / unit.unsqueeze(-1)) ** 2, mask), unit


def _unit(x: Tensor) -> Tensor:
    """By what to divide each step of float64 ``x`` [K, B], [K]: 1, or a power of two if it is huge.

    A power of two rounds nothing, and neither a square nor a sum of what is left overflows.
    """
    huge = x.detach().abs().amax(-1) > 2.0**500
    return 1.0 + huge.to(x.dtype) * 2.0**600  # which rounds to the power


def normalize(
    log_ratio: Tensor,  # [K, B], finite everywhere
    kl_old: Tensor,  # [K, B]
    finite: Tensor,  # [K, B] bool
    coeffs: StepCoefficients | None,
    config: GuardConfig,
    mean_std: tuple[Tensor, Tensor] | None,  # [K], [K]: statistics from elsewhere
    floor: Tensor | float,  # [K]: of :func:`std_floor`
) -> tuple[Tensor, Tensor | None]:
    """RatioNorm: ``excess = r_hat - 1`` [K, B], and which steps are degenerate, [K] bool.

    Only this function tells one ``ratio_norm`` from another, with ``config.RATIO_NORMS``, which
    says what a norm has to know. csrc/objective.h and kernels/objective.py have the same function.
    """
    if config.ratio_norm == "closed_form":
        assert coeffs is not None
        return torch.expm1(coeffs.s * (log_ratio + torch.where(finite, kl_old, 0.0))), None
    u = torch.expm1(log_ratio)
    if config.ratio_norm == "none":
        return u, None
    mean, std = _statistics(u, finite, config, mean_std)
    degenerate = std <= floor
    mean, std = mean.unsqueeze(-1), std.unsqueeze(-1)
    if config.ratio_norm == "standardize":
        denominator = torch.where(degenerate.unsqueeze(-1), config.target_std, std)
        excess = torch.where(finite, config.target_std * ((u - mean) / denominator), 0.0)
        return excess, degenerate
    raise NotImplementedError(f"`normalize` lacks the ratio_norm {config.ratio_norm!r}")


def squared_gain(coeffs: StepCoefficients, numel: int | Tensor, reduction: str) -> Tensor:
    """Of the spread that errors of the velocities put on ``log r``, relative to their size.

    Independent errors put ``2 kappa/D s |b| sqrt(D)`` times their size on it (``|b| / (s sqrt(D))``
    for Gaussian steps). [K, B]
    """
    scale = coeffs.kappa / numel if reduction == "mean" else coeffs.kappa
    return (2 * scale * coeffs.s * coeffs.b) ** 2 * numel


def std_floor(mean_square: Tensor, config: GuardConfig, rounding: float) -> Tensor:
    """Up to which spread of its ratios a step is degenerate, [K].

    Args:
        mean_square: of :func:`squared_gain`, over all the samples of a step; it may be infinite.
        rounding: of ``config.rounding_of``.
    """
    if rounding == 0:
        return torch.full_like(mean_square, config.least_std_floor)
    floor = (rounding * mean_square.sqrt()).clamp(max=config.target_std)
    return floor.clamp(min=config.least_std_floor)


def _statistics(
    u: Tensor, finite: Tensor, config: GuardConfig, mean_std: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Each step's mean and std (correction 0) of ``u`` over its finite samples.

    A std of 0 has a gradient of 0, not that of a square root; without finite samples it is NaN.
    """
    if mean_std is not None:
        return mean_std
    stats_of = u.detach() if config.detach_stats else u
    mean = masked_mean(stats_of, finite)
    variance, unit = _variance(stats_of, mean, finite)
    spread = variance.detach() > 0
    root = torch.where(spread, variance, 1.0).sqrt() * unit
    return mean, torch.where(spread, root, variance.detach() * 0.0)


def balance(
    excess: Tensor,  # [K, B]
    finite: Tensor,
    dt: Tensor | None,  # [K, B]
    config: GuardConfig,
) -> Tensor:
    """Weights over each sample's finite steps, [K, B], no gradient; 0 where not finite."""
    steps = finite.sum(0).clamp(min=1)
    if config.balance == "inverse_ratio":
        rho = (1.0 + excess.detach()).clamp(min=config.weight_floor)
        inverse = torch.where(finite, 1.0 / rho, 0.0)
        total = inverse.sum(0)
        return inverse / torch.where(total > 0, total, 1.0)
    if config.balance == "inverse_dt":
        assert dt is not None
        weights = 1.0 / (steps * dt.abs())
    else:
        weights = torch.ones_like(excess) / steps
    return torch.where(finite, weights.detach(), 0.0)


def surrogate(excess: Tensor, advantages: Tensor, config: GuardConfig) -> tuple[Tensor, Tensor]:
    """``max(-A r_hat, -A clip(r_hat))`` and where the clipped branch is active, both [K, B]."""
    a = advantages.clamp(-config.adv_clip, config.adv_clip)
    high, low = excess > config.clip_high, excess < -config.clip_low
    clipped = ((a > 0) & high) | ((a < 0) & low)
    bounded = excess.clamp(-config.clip_low, config.clip_high)
    return -a * (1.0 + torch.where(clipped, bounded, excess)), clipped


def evaluate(
    log_ratio: Tensor,  # [K, B]
    kl_old: Tensor,  # [K, B]
    kl: Tensor,  # [K, B] to the reference model
    advantages: Tensor,  # [K, B]
    coeffs: StepCoefficients,  # [K, B]
    config: GuardConfig,
    step_weights: Tensor | None = None,  # [K, B]
    mean_std: tuple[Tensor, Tensor] | None = None,  # [K], [K]
    dtype: torch.dtype = torch.float64,  # of the results
    floor: Tensor | float | None = None,  # [K]: of :func:`std_floor`; that of the config alone
) -> Evaluation:
    """``loss = mean_i sum_k w_ki l_ki + kl_beta mean_ki kl`` with its diagnostics.

    A transition that is not finite takes part in no statistic and no weight, so that its NaN does
    not spread to others. Nor does one of which something cannot be represented in ``dtype``.
    """
    floor = config.least_std_floor if floor is None else floor
    with torch.no_grad():
        finite = finite_transitions(
            log_ratio, kl_old, kl, advantages, coeffs, config, step_weights, mean_std, dtype, floor
        )
    safe_log_ratio = torch.where(finite, log_ratio, 0.0)
    excess, degenerate = normalize(safe_log_ratio, kl_old, finite, coeffs, config, mean_std, floor)
    excess = torch.where(finite, excess, 0.0)
    if step_weights is None:
        weights = balance(excess, finite, coeffs.dt, config)
    else:
        weights = torch.where(finite, step_weights, 0.0)
    losses, clipped = surrogate(excess, torch.where(finite, advantages, 0.0), config)
    losses = torch.where(finite, weights * losses, 0.0)
    samples: Tensor | int = finite.shape[1]
    transitions: Tensor | int = finite.numel()
    if config.nonfinite == "drop":
        samples = finite.any(0).sum().clamp(min=1)
        transitions = finite.sum().clamp(min=1)
    loss = losses.sum(0).sum() / samples
    if config.kl_beta:
        loss = loss + config.kl_beta * (torch.where(finite, kl, 0.0).sum() / transitions)
    if config.nonfinite == "propagate":  # the loss turns NaN, and that transition's gradient
        poison = torch.where(finite, 0.0, math.nan).to(log_ratio.dtype)
        loss = loss + (log_ratio * poison).sum()
    with torch.no_grad():
        metrics = _metrics(
            safe_log_ratio, excess, clipped, weights, kl_old, finite, config, degenerate
        )
        excess = torch.where(finite, excess, math.nan)
    return Evaluation(loss, excess, weights.detach(), metrics)


def representable_ratio(log_ratio: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether a result of this dtype can represent a log-ratio and its ratio, bool."""
    limit = largest(dtype)
    return (log_ratio.abs() <= limit) & (torch.expm1(log_ratio.double()) <= limit)


def finite_transitions(
    log_ratio: Tensor,  # [K, B]
    kl_old: Tensor,  # [K, B]
    kl: Tensor,  # [K, B]
    advantages: Tensor,  # [K, B]
    coeffs: StepCoefficients,  # [K, B]
    config: GuardConfig,
    step_weights: Tensor | None,  # [K, B]
    mean_std: tuple[Tensor, Tensor] | None,  # [K], [K]
    dtype: torch.dtype,  # of the results
    floor: Tensor | float,  # [K]: of :func:`std_floor`
) -> Tensor:
    """Which transitions take part in a loss and its statistics, [K, B] bool.

    A ratio that is finite may have no loss that a result can represent, for want of finite
    statistics or because its weight is too large. Statistics that are not formed yet make of no
    sample more than sqrt(B) standard deviations.
    """
    limit = largest(dtype)
    finite = representable_ratio(log_ratio, dtype) & advantages.isfinite()
    # the weight, or what it is at most: how many of the steps are finite is not known yet
    weight: Tensor | float = 1.0 / coeffs.dt.abs() if config.balance == "inverse_dt" else 1.0
    if step_weights is not None:
        finite, weight = finite & step_weights.isfinite(), step_weights
    if config.kl_beta:
        finite = finite & (kl.abs() <= limit)
    if RATIO_NORMS[config.ratio_norm].statistics and mean_std is None:
        spread = max(config.target_std, config.least_std_floor) * math.sqrt(log_ratio.shape[-1])
        losses = advantages.abs().clamp(max=config.adv_clip) * (1.0 + spread)
    else:
        everywhere = torch.ones_like(finite)
        excess, _ = normalize(log_ratio, kl_old, everywhere, coeffs, config, mean_std, floor)
        losses, _ = surrogate(excess, advantages, config)
        finite = finite & (excess.abs() <= limit)
    return finite & ((losses * weight).abs() <= limit)


def _metrics(
    log_ratio: Tensor,
    excess: Tensor,
    clipped: Tensor,
    weights: Tensor,
    kl_old: Tensor,
    finite: Tensor,
    config: GuardConfig,
    degenerate: Tensor | None,
) -> Metrics:
    u = torch.expm1(log_ratio)

    def share(mask: Tensor) -> Tensor:
        return masked_mean(mask.to(u.dtype), finite)

    return Metrics(
        ratio_bias=masked_mean(u, finite),
        ratio_std=masked_std(u, finite),
        ratio_hat_bias=masked_mean(excess, finite),
        ratio_hat_std=masked_std(excess, finite),
        clip_fraction=share(clipped),
        clip_fraction_high=share(excess > config.clip_high),
        clip_fraction_low=share(excess < -config.clip_low),
        kl_old=masked_mean(kl_old, finite),
        grad_weight=masked_mean(weights, finite),
        nonfinite=(~finite).sum(-1).to(u.dtype),
        degenerate=torch.zeros_like(u[:, 0]) if degenerate is None else degenerate.to(u.dtype),
    )
