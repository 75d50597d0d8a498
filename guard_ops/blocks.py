"""The objective's building blocks on [K, B] numbers, for objectives that guard_loss lacks."""

from __future__ import annotations

import torch
from torch import Tensor

from . import objective
from .checks import check_floating
from .config import RATIO_NORMS, GuardConfig
from .schedule import StepCoefficients
from .statistics import RatioStatistics, check_statistics
from .transitions import check_balance, check_coefficients, check_config, check_gaussian, normal


def ratio_norm(
    log_ratio: Tensor,
    *,
    config: GuardConfig,
    coeffs: StepCoefficients | None = None,
    kl_old: Tensor | None = None,
    statistics: RatioStatistics | None = None,
) -> Tensor:
    """RatioNorm: ``excess = r_hat - 1`` [K, B] of ``log_ratio`` [K, B], differentiable.

    ``closed_form`` needs ``coeffs`` ([K] or [K, B]) and ``kl_old`` [K, B] as :func:`log_ratio`
    gives them. A ``std_floor`` of "auto" is 1e-8 here, where nothing is known of the velocities.
    Transitions that are not finite, or have no finite ratio in the dtype of
    ``log_ratio`` (at least float32), come back as NaN and take no part in statistics.
    """
    _check_rows("log_ratio", log_ratio)
    check_config(config)
    mean_std = None
    if statistics is not None:
        mean_std = check_statistics(statistics, config, log_ratio.shape[:-1], log_ratio.device)
    if RATIO_NORMS[config.ratio_norm].debiased:
        if coeffs is None or kl_old is None:
            missing = "coeffs" if coeffs is None else "kl_old"
            raise ValueError(f"`{missing}` is missing: {config.ratio_norm} needs both")
        coeffs = _row_coefficients(coeffs, log_ratio)
        check_gaussian(coeffs, config.ratio_norm)
        _check_rows("kl_old", kl_old, log_ratio)
    wide, limit = log_ratio.double(), objective.largest(log_ratio.dtype)
    kl = torch.zeros_like(wide) if kl_old is None else normal(kl_old).double()
    finite = objective.representable_ratio(log_ratio.detach(), log_ratio.dtype)
    if RATIO_NORMS[config.ratio_norm].debiased:
        finite = finite & (kl.detach().abs() <= limit)
    safe, kl = torch.where(finite, wide, 0.0), torch.where(finite, kl, 0.0)
    floor = config.least_std_floor
    excess, _ = objective.normalize(safe, kl, finite, coeffs, config, mean_std, floor)
    finite = finite & (excess.detach().abs() <= limit)
    return torch.where(finite, excess, float("nan")).to(log_ratio.dtype)


def balance_weights(
    excess: Tensor, *, config: GuardConfig, coeffs: StepCoefficients | None = None
) -> Tensor:
    """Weights over each sample's K steps, [K, B], of ``excess`` [K, B]; no gradient.

    ``inverse_dt`` needs ``coeffs`` ([K] or [K, B]), ``inverse_ratio`` more than one step. A step
    that is not finite gets 0.
    """
    _check_rows("excess", excess)
    check_config(config)
    check_balance(config, excess.shape[0] if excess.ndim == 2 else 1)
    dt = None
    if config.balance == "inverse_dt":
        if coeffs is None:
            raise ValueError("`coeffs` is missing: inverse_dt needs it")
        dt = _row_coefficients(coeffs, excess).dt
    steps = torch.atleast_2d(excess.double())  # one step: [B] -> [1, B]
    return objective.balance(steps, steps.isfinite(), dt, config).to(excess.dtype).view_as(excess)


def clipped_surrogate(excess: Tensor, advantages: Tensor, *, config: GuardConfig) -> Tensor:
    """``max(-A r_hat, -A clip(r_hat, 1 - clip_low, 1 + clip_high))`` [K, B], differentiable.

    Args:
        excess: ``r_hat - 1`` [K, B]. advantages: [B] or [K, B].
    """
    _check_rows("excess", excess)
    _check_rows("advantages", advantages)
    check_config(config)
    # Ranks first: a traced comparison of [B] with [K, B] would hold only for batches other than K.
    like = excess.shape if advantages.ndim == excess.ndim else excess.shape[-1:]
    if advantages.shape != like:
        raise ValueError(
            f"`advantages` has shape {tuple(advantages.shape)} but `excess` {tuple(excess.shape)}"
        )
    _check_device("advantages", advantages.device, "`excess`", excess)
    advantages = normal(advantages).double()
    losses, _ = objective.surrogate(excess.double(), advantages, config)
    return losses.to(excess.dtype)


def _check_rows(name: str, value: Tensor, like: Tensor | None = None) -> None:
    check_floating(name, value)
    if value.ndim not in (1, 2) or value.numel() == 0:
        raise ValueError(f"`{name}` has shape {tuple(value.shape)}; it needs [K, B] or [B]")
    if like is not None and value.shape != like.shape:
        raise ValueError(
            f"`{name}` has shape {tuple(value.shape)} but `log_ratio` {tuple(like.shape)}"
        )
    if like is not None:
        _check_device(name, value.device, "`log_ratio`", like)


def _check_device(name: str, device: torch.device, other: str, like: Tensor) -> None:
    if device != like.device:
        raise ValueError(f"`{name}` is on {device} but {other} on {like.device}")


def _row_coefficients(coeffs: StepCoefficients, rows: Tensor) -> StepCoefficients:
    """Coefficients that broadcast over ``rows``: [K] or [K, B] for [K, B], [] for [B]."""
    check_coefficients(coeffs)
    table, steps = normal(coeffs.table), rows.shape[:-1]
    if coeffs.shape not in ((steps, rows.shape) if steps else (steps,)):
        raise ValueError(
            f"`coeffs` has shape {tuple(coeffs.shape)}; with [K, B] numbers of shape "
            f"{tuple(rows.shape)} it needs {tuple(steps)}"
            + (f" or {tuple(rows.shape)}" if steps else "")
        )
    _check_device("coeffs", coeffs.device, "the [K, B] numbers", rows)
    table = table.reshape(table.shape + (1,) * (rows.ndim + 1 - table.ndim))
    return StepCoefficients._of(table, coeffs.gaussian, coeffs.deterministic)
