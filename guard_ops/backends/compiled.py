"""The operators of csrc/, which are called in the same way for CPU and CUDA tensors.

This file calls them, describes their results to torch for tracing, and refuses an extension that
was built with other operands or another objective than this package has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from .. import extension
from ..config import CHOICES, FLAGS, OBJECTIVE_NUMBERS, RATIO_NORMS, Objective, RatioNorm
from ..transitions import STEP_LATENTS, Latents, Rows, Transitions
from . import results

FUSED = True


def layout() -> dict[str, object]:
    """The names of operands and of the objective, in the order in which operators take them."""
    norms = [(name, tuple(RATIO_NORMS[name])) for name in get_args(RatioNorm)]
    return {
        "latents": Latents._fields,
        "step_latents": STEP_LATENTS,
        "rows": Rows._fields,
        "choices": (*CHOICES, *FLAGS),
        "numbers": OBJECTIVE_NUMBERS,
        **CHOICES,
        "ratio_norm": norms,
    }


_C = extension.load()  # registers torch.ops.guard_ops
build_info = _C.build_info
if getattr(_C, "layout", dict)() != layout():
    raise ImportError(
        "the compiled kernels are those of another version of guard-ops, with other operands or "
        f"another objective; to rebuild them: {extension.REBUILD}"
    )
_ops = torch.ops.guard_ops


def _as_lists(t: Transitions) -> tuple[list[Tensor | None], Tensor | None, Tensor, float]:
    """A call's operands as operators take them.

    The latents are a list, because torch.compile of torch 2.9 cannot hand a named tuple that it has
    traced the making of to an operator.
    """
    return [*t.latents], t.seed, t.coefficients, t.guidance_scale


def sums(t: Transitions) -> Tensor:
    """[3, K, B] float64; reads every operand once."""
    out: Tensor = _ops.sums(*_as_lists(t))
    return out


def gradient(
    t: Transitions, c: Tensor, cond: bool = True, uncond: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """As ``reference.gradient``; reads an operand once, and only if a coefficient needs it."""
    grad, grad_uncond = _ops.gradient(c, *_as_lists(t), cond, uncond)
    return (grad if cond else None), (grad_uncond if uncond else None)


def sde_step(t: Transitions) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.sde_step``, in one pass."""
    out: tuple[Tensor, Tensor, Tensor] = _ops.sde_step(*_as_lists(t))
    return out


def guard_loss(
    t: Transitions, rows: Rows, objective: Objective, cond: bool, uncond: bool
) -> tuple[Tensor, ...]:
    """Loss and gradient; each operand is read once while the batch, or a row, fits on chip.

    Returns:
        loss [], grad and grad_uncond (empty when not asked for), per_row [4, K, B] (log_ratio,
        excess, weights, kl), metrics [11, K] as Metrics, and ``d loss / d sums`` [3, K, B] float64,
        from which :func:`gradient` makes the same gradient again, or a multiple of it.
    """
    out: tuple[Tensor, ...] = _ops.guard_loss(*_as_lists(t), [*rows], *objective, cond, uncond)
    return out


def evaluate(sums: Tensor, t: Transitions, rows: Rows, objective: Objective) -> tuple[Tensor, ...]:
    """What :func:`guard_loss` makes of sums [3, K, B] that it is given; no latent is read.

    Returns:
        loss, per_row, metrics and ``d loss / d sums``.
    """
    out: tuple[Tensor, ...] = _ops.evaluate(sums, *_as_lists(t), [*rows], *objective)
    return out


def ratio_statistics(sums: Tensor, t: Transitions, rows: Rows, objective: Objective) -> Tensor:
    """``objective.ratio_statistics`` of sums [3, K, B], [5, K] float64; no latent is read.

    A transition is finite or not as where ``rows.statistics`` is None, which may be given.
    """
    out: Tensor = _ops.ratio_statistics(sums, *_as_lists(t), [*rows], *objective)
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

    Nothing is written if ``factor`` is 1. A device finds that out itself, so the host does not wait
    for the number; a number that the host has spares it the operator.
    """
    if not _is_one(factor):
        _ops.scaled_(*grads, factor, sum_grads, *_as_lists(transitions()), cond, uncond)
    return tuple(grads)


def _is_one(factor: Tensor) -> bool:
    """Whether the host knows that it is 1."""
    try:
        return factor.device.type == "cpu" and factor.item() == 1
    except RuntimeError:  # a number that is only traced (FakeTensorMode, make_fx) has no value
        return False


@torch.library.register_fake("guard_ops::sums")
def _(latents, *_):  # type: ignore[no-untyped-def]
    return results.sums(latents)


@torch.library.register_fake("guard_ops::gradient")
def _(_, latents, seed, coefficients, guidance_scale, cond, uncond):  # type: ignore[no-untyped-def]
    return results.gradients(latents, cond, uncond)


@torch.library.register_fake("guard_ops::guard_loss")
def _(latents, *rest):  # type: ignore[no-untyped-def]
    *_, cond, uncond = rest
    return results.loss(latents, cond, uncond)


@torch.library.register_fake("guard_ops::evaluate")
def _(_, latents, *rest):  # type: ignore[no-untyped-def]
    return results.evaluation(latents)


@torch.library.register_fake("guard_ops::ratio_statistics")
def _(_, latents, *rest):  # type: ignore[no-untyped-def]
    return results.statistics(latents)


@torch.library.register_fake("guard_ops::sde_step")
def _(latents, *_):  # type: ignore[no-untyped-def]
    return results.step(latents)


@torch.library.register_fake("guard_ops::scaled_")
def _(*_):  # type: ignore[no-untyped-def]
    return None
