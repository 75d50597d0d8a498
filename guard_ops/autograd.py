"""The torch.autograd.Functions that call the chosen backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import over_ranks
from .config import Objective
from .transitions import DIFFERENTIATED, Rows, Transitions, counted, flatten

Context = Any  # a FunctionCtx, which has no static type for the attributes that forward adds


class _NoDoubleBackward(torch.autograd.Function):
    """An identity over a fused kernel's gradient, whose backward raises an error that says why."""

    @staticmethod
    def forward(ctx: Context, name: str, grad: Tensor, *inputs: Tensor) -> Tensor:
        ctx.name = name
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> None:
        raise RuntimeError(
            f"the {ctx.name!r} backend has no double backward; compute this loss under "
            "guard_ops.use_backend('reference'), which is twice differentiable"
        )


def _once(name: str, grad: Tensor | None, *inputs: Tensor | None) -> Tensor | None:
    """``grad``, made to raise when it is differentiated, if the backward is itself recorded."""
    if grad is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return grad
    result: Tensor = _NoDoubleBackward.apply(name, grad, *(x for x in inputs if x is not None))
    return result


def _save(ctx: Context, tensors: Sequence[Tensor | None]) -> None:
    """``ctx.save_for_backward``, which refuses tensors that were made in inference mode.

    Those are kept as they are: torch counts no change of theirs, so there is nothing to compare in
    the backward pass.
    """
    apart = {}
    if not torch.compiler.is_compiling():
        apart = {n: x for n, x in enumerate(tensors) if x is not None and x.is_inference()}
    ctx.apart = apart
    ctx.save_for_backward(*(None if n in apart else x for n, x in enumerate(tensors)))


def _saved(ctx: Context) -> Iterator[Tensor | None]:
    """What :func:`_save` was given; raises if one was changed in place since."""
    return iter([ctx.apart.get(n, x) for n, x in enumerate(ctx.saved_tensors)])


class TransitionSums(torch.autograd.Function):
    """``S1``, ``S2`` and the reference sum, [3, K, B].

    The backward gives their gradient to the backend's ``gradient`` as coefficients.
    """

    @staticmethod
    def forward(
        ctx: Context,
        backend: ModuleType,
        guidance_scale: float,
        model_output: Tensor,  # [K, B, D]
        model_output_uncond: Tensor | None,  # [K, B, D]
        *constants: Any,  # the rest of Transitions.tensors()
    ) -> Tensor:
        ctx.backend, ctx.guidance_scale = backend, guidance_scale
        tensors = (model_output, model_output_uncond, *constants)
        _save(ctx, tensors)
        out: Tensor = backend.sums(Transitions.take(iter(tensors), guidance_scale))
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Any:
        _, _, cond, uncond, *constants = ctx.needs_input_grad
        t = Transitions.take(_saved(ctx), ctx.guidance_scale)
        outputs = (t.latents.model_output, t.latents.model_output_uncond)
        grads = ctx.backend.gradient(t, grad, cond, uncond)
        if ctx.backend.FUSED:
            grads = tuple(_once(ctx.backend.NAME, g, grad, *outputs) for g in grads)
        return (None, None, *grads, *(None for _ in constants))


def transition_sums(backend: ModuleType, t: Transitions) -> Tensor:
    """[3, K, B] float64, differentiable in ``model_output`` and ``model_output_uncond``."""
    sums: Tensor = TransitionSums.apply(backend, t.guidance_scale, *t.tensors())
    return sums


class _OverShards(torch.autograd.Function):
    """Sums over a shard -> sums over the whole latent; each rank's gradient is that of its part."""

    @staticmethod
    def forward(ctx: Context, sums: Tensor, counted: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        whole, elements = over_ranks.whole_latents(sums, counted, group)
        ctx.mark_non_differentiable(elements)
        return whole, elements

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def over_shards(sums: Tensor, t: Transitions, group: Any) -> tuple[Tensor, Tensor]:
    """Sums [3, K, B] and D [K, B] of latents of which each rank of ``group`` has a part."""
    whole: tuple[Tensor, Tensor] = _OverShards.apply(sums, counted(t), group)
    return whole


def _scaled(
    backend: ModuleType,
    t: Transitions,
    sum_grads: Tensor,  # [3, K, B] float64
    grad_output: Tensor,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, ...]:
    """The gradients times ``grad_output``, formed anew from ``sum_grads`` so as to round once."""
    coefficients = sum_grads * grad_output.detach().double()
    grads: tuple[Tensor | None, ...] = backend.gradient(t, coefficients, *wanted)
    return grads


Fused = Callable[[Transitions, Rows, Objective, bool, bool], tuple[Tensor, ...]]


class GuardLoss(torch.autograd.Function):
    """Fused loss and gradient: the forward computes both, the backward returns the gradient.

    The gradient is scaled by ``grad_output`` in its own buffer, so that no second one is allocated.
    The buffer is returned once: another backward through the same graph (``retain_graph``) computes
    the gradient anew from ``d loss / d sums``. A float16 gradient could underflow, so the forward
    leaves it out, and the backward computes it when the loss scale is known.
    """

    @staticmethod
    def forward(
        ctx: Context,
        backend: ModuleType,
        fused: Fused,
        t: Transitions,  # its operands are detached
        rows: Rows,
        objective: Objective,
        wanted: tuple[bool, bool],
        model_output: Tensor,  # [K, B, *latent] or [B, *latent]
        model_output_uncond: Tensor | None,  # the same shape
    ) -> Any:
        ctx.backend, ctx.wanted, ctx.guidance_scale = backend, wanted, t.guidance_scale
        ctx.set_materialize_grads(False)  # else torch makes zeros for the diagnostics
        now = (False, False) if model_output.dtype == torch.float16 else wanted
        loss, *buffers, per_row, metrics, ctx.sum_grads = fused(t, rows, objective, *now)
        ctx.buffers = buffers if any(now) else None
        given = t.latents._replace(
            model_output=model_output, model_output_uncond=model_output_uncond
        )
        _save(ctx, t._replace(latents=given).tensors())
        ctx.mark_non_differentiable(per_row, metrics)
        return loss, per_row, metrics

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor | None, *_: Any) -> Any:
        # this raises if an operand was changed in place, even where no gradient is wanted
        t = Transitions.take(_saved(ctx), ctx.guidance_scale)
        if grad_output is None:
            return (None,) * 8
        outputs = (t.latents.model_output, t.latents.model_output_uncond)

        def transitions() -> Transitions:  # copies a latent that is not dense, so only if needed
            rows = ctx.sum_grads.shape[1:]
            flat = {
                name: flatten(x.detach(), *rows)
                for name, x in zip(DIFFERENTIATED, outputs, strict=True)
                if x is not None
            }
            return t._replace(latents=t.latents._replace(**flat))

        buffers, ctx.buffers = ctx.buffers, None
        if buffers is None:
            grads = _scaled(ctx.backend, transitions(), ctx.sum_grads, grad_output, ctx.wanted)
        else:
            grads = ctx.backend.scaled(
                transitions, ctx.sum_grads, buffers, grad_output.detach(), *ctx.wanted
            )
        handed = [
            _once(ctx.backend.NAME, grad.view(output.shape), grad_output, *outputs)
            if wanted and grad is not None and output is not None
            else None
            for grad, output, wanted in zip(grads, outputs, ctx.wanted, strict=True)
        ]
        return (None,) * 6 + tuple(handed)


class TracedGuardLoss(torch.autograd.Function):
    """:class:`GuardLoss` for ``torch.compile``, which can trace no buffer that outlives a call."""

    @staticmethod
    def forward(
        ctx: Context,
        backend: ModuleType,
        guidance_scale: float,
        objective: tuple[tuple[int, ...], tuple[float, ...]],  # the fields of an Objective
        wanted: tuple[bool, bool],
        *tensors: Any,  # those of Transitions.tensors(), then those of Rows
    ) -> Any:
        ctx.backend, ctx.wanted, ctx.guidance_scale = backend, wanted, guidance_scale
        each = iter(tensors)
        t = Transitions.take(each, guidance_scale)
        rows = Rows._make(list(each))
        ctx.deferred = t.latents.model_output.dtype in (torch.float16, torch.bfloat16)
        now = (False, False) if ctx.deferred else wanted
        out = backend.guard_loss(t, rows, Objective(*objective), *now)
        loss, *buffers, per_row, metrics, sum_grads = out
        ctx.constants = len(tensors) - len(wanted)
        ctx.save_for_backward(*([sum_grads, *t.tensors()] if ctx.deferred else buffers))
        ctx.mark_non_differentiable(per_row, metrics)
        return loss, per_row, metrics

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor, *_: Any) -> Any:
        if ctx.deferred:
            sum_grads, *tensors = ctx.saved_tensors
            t = Transitions.take(iter(tensors), ctx.guidance_scale)
            grads = _scaled(ctx.backend, t, sum_grads, grad_output, ctx.wanted)
        else:
            grads = tuple(grad * grad_output for grad in ctx.saved_tensors)
        handed = [g if wanted else None for g, wanted in zip(grads, ctx.wanted, strict=True)]
        return (None,) * 4 + (*handed,) + (None,) * ctx.constants


def guard_loss(
    backend: ModuleType,
    fused: Fused,  # its guard_loss, or that over ranks
    t: Transitions,  # its operands require no grad, unless torch.compile is tracing
    rows: Rows,
    objective: Objective,
    model_output: Tensor,  # [K, B, *latent] or [B, *latent]
    model_output_uncond: Tensor | None,  # the same shape
) -> Any:
    """(loss [], per_row [4, K, B], metrics [11, K]) of a fused backend."""
    outputs = (model_output, model_output_uncond)
    cond, uncond = (x is not None and x.requires_grad and torch.is_grad_enabled() for x in outputs)
    if torch.compiler.is_compiling():
        values = (objective.choices, objective.numbers)
        return TracedGuardLoss.apply(
            backend, t.guidance_scale, values, (cond, uncond), *t.tensors(), *rows
        )
    return GuardLoss.apply(backend, fused, t, rows, objective, (cond, uncond), *outputs)
