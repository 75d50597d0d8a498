"""The objective's building blocks on [K, B] numbers, for other people's objectives."""

from __future__ import annotations

import torch
from torch import Tensor

from . import objective
from .config import GuardConfig
from .schedule import StepCoefficients
from .statistics import RatioStatistics


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
    gives them. Transitions that are not finite come back as NaN and take no part in statistics.
    """
    _check_rows("log_ratio", log_ratio)
    if config.ratio_norm == "closed_form":
        if coeffs is None or kl_old is None:
            raise ValueError(
                f"`{'coeffs' if coeffs is None else 'kl_old'}` is missing: closed_form needs both"
            )
        check_gaussian(coeffs)
        _check_rows("kl_old", kl_old, log_ratio)
        coeffs = _row_coefficients(coeffs, log_ratio)
    wide = log_ratio.double()
    finite = wide.isfinite()
    mean_std = None if statistics is None else (statistics.mean, statistics.std)
    safe = torch.where(finite, wide, 0.0)
    kl = torch.zeros_like(safe) if kl_old is None else kl_old.double()
    excess = objective.normalize(safe, kl, finite, coeffs, config, mean_std)
    return torch.where(finite, excess, float("nan")).to(log_ratio.dtype)


def balance_weights(
    excess: Tensor, *, config: GuardConfig, coeffs: StepCoefficients | None = None
) -> Tensor:
    """Weights over each sample's K steps, [K, B], of ``excess`` [K, B]; no gradient.

    ``inverse_dt`` needs ``coeffs`` ([K] or [K, B]). Not finite steps get 0.
    """
    _check_rows("excess", excess)
    dt = None
    if config.balance == "inverse_dt":
        if coeffs is None:
            raise ValueError("`coeffs` is missing: inverse_dt needs it")
        dt = _row_coefficients(coeffs, excess).dt
    finite = excess.isfinite()
    return objective.balance(excess.double(), finite, dt, config).to(excess.dtype)


def clipped_surrogate(excess: Tensor, advantages: Tensor, *, config: GuardConfig) -> Tensor:
    """``max(-A r_hat, -A clip(r_hat, 1 - clip_low, 1 + clip_high))`` [K, B], differentiable.

    Args:
        excess: ``r_hat - 1`` [K, B]. advantages: [B] or [K, B].
    """
    _check_rows("excess", excess)
    if advantages.shape not in (excess.shape, excess.shape[-1:]):
        raise ValueError(
            f"`advantages` has shape {tuple(advantages.shape)} but `excess` {tuple(excess.shape)}"
        )
    losses, _ = objective.surrogate(excess.double(), advantages.double(), config)
    return losses.to(excess.dtype)


def check_gaussian(coeffs: StepCoefficients) -> None:
    """closed_form is exact only for the Gaussian kappa."""
    if not coeffs.gaussian:
        raise ValueError(
            "`config.ratio_norm` is closed_form, which needs the Gaussian kappa 1 / (2 s^2); "
            "`coeffs` are of kind cps"
        )


def _check_rows(name: str, value: Tensor, like: Tensor | None = None) -> None:
    if not value.is_floating_point():
        raise TypeError(f"`{name}` has dtype {value.dtype}; it needs a floating dtype")
    if value.ndim not in (1, 2) or value.numel() == 0:
        raise ValueError(f"`{name}` has shape {tuple(value.shape)}; it needs [K, B] or [B]")
    if like is not None and value.shape != like.shape:
        raise ValueError(
            f"`{name}` has shape {tuple(value.shape)} but `log_ratio` {tuple(like.shape)}"
        )


def _row_coefficients(coeffs: StepCoefficients, rows: Tensor) -> StepCoefficients:
    table = coeffs.table
    table = table.reshape(table.shape + (1,) * (rows.ndim + 1 - table.ndim))
    return StepCoefficients._of(table, coeffs.gaussian, coeffs.deterministic)
