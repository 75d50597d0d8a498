"""What torch is told of the compiled operators: shapes and dtypes, for every device alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from .. import extension
from ..config import Balance, GuardConfig, RatioNorm
from ..objective import Metrics
from ..transitions import compute_dtype

if TYPE_CHECKING:
    from .._C import PlainCall

build_info = extension.load().build_info  # registers torch.ops.guard_ops
_RATIO_NORM = {name: i for i, name in enumerate(get_args(RatioNorm))}
_BALANCE = {name: i for i, name in enumerate(get_args(Balance))}


def objective_arguments(config: GuardConfig, gaussian: bool) -> tuple[int | bool | float, ...]:
    """The objective as ``guard_ops::guard_loss`` takes it."""
    return (
        _RATIO_NORM[config.ratio_norm],
        _BALANCE[config.balance],
        config.detach_stats,
        config.reduction == "mean",
        config.nonfinite == "drop",
        gaussian,
        config.target_std,
        config.std_floor,
        config.clip_low,
        config.clip_high,
        config.adv_clip,
        config.weight_floor,
        config.kl_beta,
    )


def guard_loss_plain(
    call: PlainCall,
    mean_std: Tensor | None,  # [2, K] float64
    config: GuardConfig,
    gaussian: bool,
    cond: bool,
    uncond: bool,
) -> tuple[Tensor, ...]:
    """The operator on what C++ has checked."""
    return call.guard_loss(mean_std, objective_arguments(config, gaussian), cond, uncond)


def _fake_gradient(branch: Tensor | None, wanted: bool, like: Tensor) -> Tensor:
    return torch.empty_like(branch) if wanted and branch is not None else like.new_empty(0)


def _fake_dtype(t: tuple[Tensor | None, ...]) -> torch.dtype:
    return compute_dtype(*(x for x in t[:8] if x is not None))


@torch.library.register_fake("guard_ops::sums")
def _(*t):  # type: ignore[no-untyped-def]
    return t[0].new_empty((3, *t[0].shape[:2]), dtype=torch.float64)


@torch.library.register_fake("guard_ops::gradient")
def _(_, *args):  # type: ignore[no-untyped-def]
    cond, uncond = args[-2:]
    return _fake_gradient(args[0], cond, args[0]), _fake_gradient(args[1], uncond, args[0])


@torch.library.register_fake("guard_ops::guard_loss")
def _(*args):  # type: ignore[no-untyped-def]
    cond, uncond = args[-2:]
    v, uncond_output = args[:2]
    per_row = v.new_empty((4, *v.shape[:2]), dtype=_fake_dtype(args))
    return (
        per_row.new_empty(()),
        _fake_gradient(v, cond, v),
        _fake_gradient(uncond_output, uncond, v),
        per_row,
        per_row.new_empty((len(Metrics._fields), v.shape[0])),
        per_row.new_empty((3, *v.shape[:2]), dtype=torch.float64),
    )


@torch.library.register_fake("guard_ops::sde_step")
def _(v, x, coefficients, noise, seed):  # type: ignore[no-untyped-def]
    wide = _fake_dtype((v, x, noise, None, None, None, None, None))
    mean = x.new_empty(x.shape, dtype=wide)
    square = x.new_empty(x.shape[:2], dtype=torch.float64)
    return x.new_empty(x.shape), mean, square


@torch.library.register_fake("guard_ops::scaled_")
def _(*args):  # type: ignore[no-untyped-def]
    return None
