"""The C++ kernels for CPU tensors (``csrc/cpu``), through their registered operators."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .. import extension
from ..config import GuardConfig
from ..transitions import Transitions
from .operators import build_info, objective_arguments
from .operators import guard_loss_plain as guard_loss_plain

NAME = "cpu"
FUSED = True

_isa = os.environ.get("GUARD_OPS_CPU_ISA")
if _isa and _isa != build_info()["cpu_isa"]:
    warnings.warn(
        f"guard_ops: GUARD_OPS_CPU_ISA is {_isa!r}, which this build or processor does not have "
        f"({build_info()['cpu_isa_built']}); using {build_info()['cpu_isa']}",
        RuntimeWarning,
        stacklevel=2,
    )
if _keep := os.environ.get("GUARD_OPS_CPU_CACHE_MB"):
    if _keep.isdecimal():
        extension.load().keep_buffers(int(_keep) * 2**20)
    else:
        warnings.warn(
            f"guard_ops: GUARD_OPS_CPU_CACHE_MB is {_keep!r}; it needs a whole number; keeping 256",
            RuntimeWarning,
            stacklevel=2,
        )
_ops = torch.ops.guard_ops


def release_memory() -> int:
    """Give back to the system what is kept of freed results; returns how many bytes that were.

    Gradients and samples of 128 KiB and more keep their memory when they are freed, for the next
    result of that size: filling new pages takes longer than the kernels do. The latest eight, of
    256 MiB together (``GUARD_OPS_CPU_CACHE_MB`` sets another limit, 0 keeps nothing).
    """
    count: int = extension.load().release_buffers()
    return count


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
    advantages: Tensor,  # [K, B] float64 or float32, like the next two
    old_log_prob: Tensor | None,  # [K, B]
    step_weights: Tensor | None,  # [K, B]
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
        *objective_arguments(config, gaussian),
        cond,
        uncond,
    )
    return out


def scaled(
    transitions: Callable[[], Transitions],
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
        return gradient(transitions(), sum_grads * value, cond, uncond)
    if value != 1.0:
        for grad in grads:
            grad.mul_(value)
    return tuple(grads)
