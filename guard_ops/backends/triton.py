"""The Triton kernels for GPU tensors (``kernels/``), as torch operators."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    raise ImportError("triton is not installed")
from ..config import Objective
from ..kernels import given_sums, launch
from ..kernels import gradient as gradients
from ..kernels import guard_loss as losses
from ..kernels import sde_step as steps
from ..kernels import sums as summed
from ..kernels.evaluate import MAX_BATCH as MAX_BATCH  # of guard_loss
from ..transitions import Rows, Transitions
from . import results

if not launch.INTERPRETED and torch.cuda.device_count() + torch.xpu.device_count() == 0:
    raise ImportError(
        "torch sees no GPU, CUDA, ROCm or XPU (TRITON_INTERPRET=1 runs the kernels on the CPU, "
        "for tests)"
    )

NAME = "triton"
FUSED = True


def supports(device: torch.device) -> bool:
    return device.type in (("cpu",) if launch.INTERPRETED else ("cuda", "xpu"))


def sums(t: Transitions) -> Tensor:
    """[3, K, B] float64; reads every operand once."""
    out: Tensor = _sums(*_as_lists(t))
    return out


def gradient(
    t: Transitions, c: Tensor, cond: bool = True, uncond: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """As ``reference.gradient``; reads every operand that a coefficient needs once."""
    grad, grad_uncond = _gradient(c, *_as_lists(t), cond, uncond)
    return (grad if cond else None), (grad_uncond if uncond else None)


def sde_step(t: Transitions) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.sde_step``, in one pass."""
    out: tuple[Tensor, Tensor, Tensor] = _sde_step(*_as_lists(t))
    return out


def guard_loss(
    t: Transitions, rows: Rows, objective: Objective, cond: bool, uncond: bool
) -> tuple[Tensor, ...]:
    """Loss and gradient in one or two launches; :mod:`guard_ops.kernels.paths` chooses.

    Returns:
        What ``compiled.guard_loss`` does.
    """
    choices, numbers = objective
    out: tuple[Tensor, ...] = _guard_loss(
        *_as_lists(t), list(rows), list(choices), list(numbers), cond, uncond
    )
    return out


def evaluate(sums: Tensor, t: Transitions, rows: Rows, objective: Objective) -> tuple[Tensor, ...]:
    """As ``compiled.evaluate``, by one program."""
    out: tuple[Tensor, ...] = _evaluate(sums, *_as_lists(t), list(rows), *map(list, objective))
    return out


def ratio_statistics(sums: Tensor, t: Transitions, rows: Rows, objective: Objective) -> Tensor:
    """As ``compiled.ratio_statistics``, by one program."""
    out: Tensor = _ratio_statistics(sums, *_as_lists(t), list(rows), *map(list, objective))
    return out


def scaled(
    transitions: Callable[[], Transitions],
    sum_grads: Tensor,  # [3, K, B] float64: d loss / d sums
    grads: list[Tensor],
    factor: Tensor,  # []
    cond: bool,
    uncond: bool,
) -> tuple[Tensor, ...]:
    """Makes the gradients of ``loss`` those of ``factor * loss``, in place, each rounded once.

    The host does not wait for the factor: programs return at once if it is 1. A 16-bit gradient is
    computed anew from ``sum_grads``, because multiplying it would round it a second time.
    """
    grad, grad_uncond = grads
    written = grad if cond else None, grad_uncond if uncond else None
    gradients.rescale(transitions(), sum_grads, *written, factor)
    return tuple(grads)


# ---- torch operators ----------------------------------------------------------------------------


def _as_lists(t: Transitions) -> tuple[Any, ...]:
    """The groups as an operator takes them, which knows lists and no named tuples."""
    return (list(t.latents), t.seed, t.coefficients, t.guidance_scale)


@torch.library.custom_op("guard_ops_triton::sums", mutates_args=())
def _sums(
    latents: list[Tensor | None], seed: Tensor | None, coefficients: Tensor, guidance_scale: float
) -> Tensor:
    out: Tensor = _empty_sums(latents, seed, coefficients, guidance_scale)
    summed.sums(Transitions(results.named(latents), seed, coefficients, guidance_scale), out)
    return out


@_sums.register_fake
def _empty_sums(
    latents: list[Tensor | None], seed: Tensor | None, coefficients: Tensor, guidance_scale: float
) -> Tensor:
    launch.prepare(coefficients.device)
    return results.sums(latents)


@torch.library.custom_op("guard_ops_triton::gradient", mutates_args=())
def _gradient(
    c: Tensor,
    latents: list[Tensor | None],
    seed: Tensor | None,
    coefficients: Tensor,
    guidance_scale: float,
    cond: bool,
    uncond: bool,
) -> tuple[Tensor, Tensor]:
    t = Transitions(results.named(latents), seed, coefficients, guidance_scale)
    grad, grad_uncond = results.gradients(latents, cond, uncond)
    gradients.gradient(t, c, grad if cond else None, grad_uncond if uncond else None)
    return grad, grad_uncond


@_gradient.register_fake
def _fake_gradient(
    c: Tensor,
    latents: list[Tensor | None],
    seed: Tensor | None,
    coefficients: Tensor,
    guidance_scale: float,
    cond: bool,
    uncond: bool,
) -> tuple[Tensor, Tensor]:
    return results.gradients(latents, cond, uncond)


@torch.library.custom_op("guard_ops_triton::sde_step", mutates_args=())
def _sde_step(
    latents: list[Tensor | None], seed: Tensor | None, coefficients: Tensor, guidance_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, _ = _empty_step(latents, seed, coefficients, guidance_scale)
    t = Transitions(results.named(latents), seed, coefficients, guidance_scale)
    return y, mean, steps.sde_step(t, y, mean)


@_sde_step.register_fake
def _empty_step(
    latents: list[Tensor | None], seed: Tensor | None, coefficients: Tensor, guidance_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    launch.prepare(coefficients.device)
    return results.step(latents)


@torch.library.custom_op("guard_ops_triton::guard_loss", mutates_args=())
def _guard_loss(
    latents: list[Tensor | None],
    seed: Tensor | None,
    coefficients: Tensor,
    guidance_scale: float,
    rows: list[Tensor | None],
    choices: list[int],
    numbers: list[float],
    cond: bool,
    uncond: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    t = Transitions(results.named(latents), seed, coefficients, guidance_scale)
    launch.prepare(coefficients.device)
    out = results.loss(latents, cond, uncond)
    loss, grad, grad_uncond, per_row, metrics, sum_grads = out
    losses.guard_loss(
        t,
        Rows(*rows),  # type: ignore[arg-type]
        Objective(tuple(choices), tuple(numbers)),
        grad if cond else None,
        grad_uncond if uncond else None,
        loss,
        per_row,
        metrics,
        sum_grads,
    )
    return loss, grad, grad_uncond, per_row, metrics, sum_grads


@_guard_loss.register_fake
def _empty_loss(
    latents: list[Tensor | None],
    seed: Tensor | None,
    coefficients: Tensor,
    guidance_scale: float,
    rows: list[Tensor | None],
    choices: list[int],
    numbers: list[float],
    cond: bool,
    uncond: bool,
) -> tuple[Tensor, ...]:
    launch.prepare(coefficients.device)
    return results.loss(latents, cond, uncond)


@torch.library.custom_op("guard_ops_triton::evaluate", mutates_args=())
def _evaluate(
    sums: Tensor,
    latents: list[Tensor | None],
    seed: Tensor | None,
    coefficients: Tensor,
    guidance_scale: float,
    rows: list[Tensor | None],
    choices: list[int],
    numbers: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t = Transitions(results.named(latents), seed, coefficients, guidance_scale)
    out = results.evaluation(latents)
    objective = Objective(tuple(choices), tuple(numbers))
    given_sums.evaluate_sums(sums, t, Rows(*rows), objective, *out)  # type: ignore[arg-type]
    return out


@_evaluate.register_fake
def _empty_evaluation(
    sums: Tensor,
    latents: list[Tensor | None],
    seed: Tensor | None,
    coefficients: Tensor,
    guidance_scale: float,
    rows: list[Tensor | None],
    choices: list[int],
    numbers: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return results.evaluation(latents)


@torch.library.custom_op("guard_ops_triton::ratio_statistics", mutates_args=())
def _ratio_statistics(
    sums: Tensor,
    latents: list[Tensor | None],
    seed: Tensor | None,
    coefficients: Tensor,
    guidance_scale: float,
    rows: list[Tensor | None],
    choices: list[int],
    numbers: list[float],
) -> Tensor:
    t = Transitions(results.named(latents), seed, coefficients, guidance_scale)
    out = results.statistics(latents)
    objective = Objective(tuple(choices), tuple(numbers))
    given_sums.ratio_statistics(sums, t, Rows(*rows), objective, out)  # type: ignore[arg-type]
    return out


@_ratio_statistics.register_fake
def _empty_statistics(
    sums: Tensor,
    latents: list[Tensor | None],
    seed: Tensor | None,
    coefficients: Tensor,
    guidance_scale: float,
    rows: list[Tensor | None],
    choices: list[int],
    numbers: list[float],
) -> Tensor:
    return results.statistics(latents)
