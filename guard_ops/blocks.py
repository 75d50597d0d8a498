"""The objective's building blocks on [K, B] numbers, for other people's objectives."""

from __future__ import annotations

import torch
from torch import Tensor

from . import objective
from .config import GuardConfig
from .schedule import StepCoefficients, check_coefficients
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
    check_config(config)
    mean_std = None
    if statistics is not None:
        mean_std = check_statistics(statistics, config, log_ratio.shape[:-1], log_ratio.device)
    if config.ratio_norm == "closed_form":
        if coeffs is None or kl_old is None:
            raise ValueError(
                f"`{'coeffs' if coeffs is None else 'kl_old'}` is missing: closed_form needs both"
            )
        coeffs = _row_coefficients(coeffs, log_ratio)
        check_gaussian(coeffs)
        _check_rows("kl_old", kl_old, log_ratio)
    wide = log_ratio.double()
    finite = wide.isfinite()
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
    check_config(config)
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
    if advantages.shape not in (excess.shape, excess.shape[-1:]):
        raise ValueError(
            f"`advantages` has shape {tuple(advantages.shape)} but `excess` {tuple(excess.shape)}"
        )
    losses, _ = objective.surrogate(excess.double(), advantages.double(), config)
    return losses.to(excess.dtype)


def check_config(config: GuardConfig) -> None:
    """A config is a GuardConfig."""
    if not isinstance(config, GuardConfig):
        raise TypeError(f"`config` is a {type(config).__name__}; it needs a GuardConfig")


def check_statistics(
    statistics: RatioStatistics, config: GuardConfig, steps: torch.Size, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and std, of shape ``steps`` ([K], or [] for one step), if the config uses them."""
    if not isinstance(statistics, RatioStatistics):
        raise TypeError(f"`statistics` is a {type(statistics).__name__}; it needs RatioStatistics")
    if config.ratio_norm != "standardize":
        raise ValueError(
            f"`statistics` is given but `config.ratio_norm` is {config.ratio_norm!r}; only "
            "standardize uses it"
        )
    if statistics.mean.shape != steps or statistics.mean.device != device:
        raise ValueError(
            f"`statistics` covers steps of shape {tuple(statistics.mean.shape)} on "
            f"{statistics.mean.device}; this call needs {tuple(steps)} on {device}"
        )
    return statistics.mean, statistics.std


def check_gaussian(coeffs: StepCoefficients) -> None:
    """closed_form is exact only for the Gaussian kappa."""
    if not coeffs.gaussian:
        raise ValueError(
            "`config.ratio_norm` is closed_form, which needs the Gaussian kappa 1 / (2 s^2); "
            "`coeffs` are of kind cps"
        )


def _check_rows(name: str, value: Tensor, like: Tensor | None = None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` is a {type(value).__name__}; it needs a tensor")
    if not value.is_floating_point():
        raise TypeError(f"`{name}` has dtype {value.dtype}; it needs a floating dtype")
    if value.ndim not in (1, 2) or value.numel() == 0:
        raise ValueError(f"`{name}` has shape {tuple(value.shape)}; it needs [K, B] or [B]")
    if like is not None and value.shape != like.shape:
        raise ValueError(
            f"`{name}` has shape {tuple(value.shape)} but `log_ratio` {tuple(like.shape)}"
        )


def _row_coefficients(coeffs: StepCoefficients, rows: Tensor) -> StepCoefficients:
    """Coefficients that broadcast over ``rows``: [K] or [K, B] for [K, B], [] for [B]."""
    check_coefficients(coeffs)
    table, steps = coeffs.table, rows.shape[:-1]
    if coeffs.shape not in ((steps, rows.shape) if steps else (steps,)):
        raise ValueError(
            f"`coeffs` has shape {tuple(coeffs.shape)}; with [K, B] numbers of shape "
            f"{tuple(rows.shape)} it needs {tuple(steps)}"
            + (f" or {tuple(rows.shape)}" if steps else "")
        )
    table = table.reshape(table.shape + (1,) * (rows.ndim + 1 - table.ndim))
    return StepCoefficients._of(table, coeffs.gaussian, coeffs.deterministic)
