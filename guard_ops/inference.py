"""Tensors and torch.inference_mode(): what is made in it outlives it, what was made in it is taken.

Rollout engines sample in inference mode. Autograd refuses to keep a tensor that was made there,
although an update needs the rollout's latents as constants only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def lasting(function: F) -> F:
    """Makes ``function`` leave inference mode, so that autograd takes what it makes.

    For what a caller keeps: schedules, coefficients, seeds, statistics.
    """

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return outside  # type: ignore[return-value]


def normal(value: Tensor) -> Tensor:
    """A [K, B] number of a call, of which autograd can keep parts: a copy if it was made there."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return value  # nothing is recorded in inference mode
    return value.clone() if value.is_inference() else value


def save(ctx: Any, tensors: Sequence[Tensor | None]) -> None:
    """``ctx.save_for_backward``, which refuses tensors that were made in inference mode.

    Those are kept as they are: torch counts no change of theirs, so there is nothing to compare in
    the backward pass.
    """
    if torch.compiler.is_compiling():
        ctx.inference = {}
        ctx.save_for_backward(*tensors)
        return
    ctx.inference = {
        n: x for n, x in enumerate(tensors) if isinstance(x, Tensor) and x.is_inference()
    }
    ctx.save_for_backward(*(None if n in ctx.inference else x for n, x in enumerate(tensors)))


def saved(ctx: Any) -> list[Tensor | None]:
    """What :func:`save` was given; raises if one was changed in place since."""
    return [ctx.inference.get(n, x) for n, x in enumerate(ctx.saved_tensors)]
