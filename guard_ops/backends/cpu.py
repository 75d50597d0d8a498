"""The C++ kernels for CPU tensors (``csrc/cpu``), through their registered operators."""

from __future__ import annotations

import os
import warnings
from typing import get_args

import torch
from torch import Tensor

from .. import extension
from ..config import Balance, GuardConfig, RatioNorm
from ..objective import Metrics
from ..transitions import Transitions, compute_dtype

NAME = "cpu"
FUSED = True

build_info = extension.load().build_info
_isa = os.environ.get("GUARD_OPS_CPU_ISA")
if _isa and _isa != build_info()["cpu_isa"]:
    warnings.warn(
        f"guard_ops: GUARD_OPS_CPU_ISA is {_isa!r}, which this build or processor does not have "
        f"({build_info()['cpu_isa_built']}); using {build_info()['cpu_isa']}",
        RuntimeWarning,
        stacklevel=2,
    )
_ops = torch.ops.guard_ops
_RATIO_NORM = {name: i for i, name in enumerate(get_args(RatioNorm))}
_BALANCE = {name: i for i, name in enumerate(get_args(Balance))}


def supports(device: torch.device) -> bool:
    return device.type == "cpu"


def sums(t: Transitions) -> Tensor:
    """[3, K, B] float64; reads every operand once."""
    out: Tensor = _ops.sums(*t)
    return out


def gradient(
    t: Transitions, c: Tensor, cond: bool = True, uncond: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """As ``reference.gradient``; reads every operand that a coefficient needs once."""
    grad, grad_uncond = _ops.gradient(c, *t, cond, uncond)
    return (grad if cond else None), (grad_uncond if uncond else None)


def sde_step(
    v: Tensor, x: Tensor, coefficients: Tensor, noise: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.sde_step``, in one pass."""
    out: tuple[Tensor, Tensor, Tensor] = _ops.sde_step(v, x, coefficients, noise, seed)
    return out


def guard_loss(
    t: Transitions,
    advantages: Tensor,  # [K, B] float64
    old_log_prob: Tensor | None,  # [K, B] float64
    step_weights: Tensor | None,  # [K, B] float64
    mean_std: Tensor | None,  # [2, K] float64
    config: GuardConfig,
    gaussian: bool,
    cond: bool,
    uncond: bool,
) -> tuple[Tensor, ...]:
    """Loss and gradient in one pass over the latents.

    Returns:
        loss [], grad and grad_uncond (empty when not asked for), per_row [4, K, B] (log_ratio,
        excess, weights, kl), metrics [10, K] as Metrics, and ``d loss / d sums`` [3, K, B] float64,
        from which :func:`gradient` makes the same gradient again, or a multiple of it.
    """
    out: tuple[Tensor, ...] = _ops.guard_loss(
        *t,
        advantages,
        old_log_prob,
        step_weights,
        mean_std,
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
        cond,
        uncond,
    )
    return out


def scaled(
    t: Transitions,
    sum_grads: Tensor,  # [3, K, B] float64: d loss / d sums
    grads: list[Tensor],
    factor: Tensor,  # []
    cond: bool,
    uncond: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients of ``factor * loss`` from those of ``loss``: in place, emptying ``grads``.

    A 16-bit gradient would be rounded a second time; it is computed anew from the coefficients.
    """
    value = factor.item()
    if value != 1.0 and any(grad.element_size() == 2 for grad in grads):
        grads.clear()  # frees the buffers before their successors are allocated
        return gradient(t, sum_grads * value, cond, uncond)
    if value != 1.0:
        for grad in grads:
            grad.mul_(value)
    return tuple(grads)


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
