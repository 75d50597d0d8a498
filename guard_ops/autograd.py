"""The torch.autograd.Functions over the chosen backend."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .config import GuardConfig
from .transitions import Transitions, flatten

if TYPE_CHECKING:
    from ._C import PlainCall

Context = Any  # torch.autograd.function.FunctionCtx, with what forward put on it


class _NoDoubleBackward(torch.autograd.Function):
    """Identity whose own backward explains itself; put over gradients of fused kernels."""

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
    """``grad``, refusing to be differentiated when the caller builds a graph of the backward."""
    if grad is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return grad
    result: Tensor = _NoDoubleBackward.apply(name, grad, *(x for x in inputs if x is not None))
    return result


class TransitionSums(torch.autograd.Function):
    """``S1, S2`` and the reference sum [3, K, B]; the backward is the design's two coefficients."""

    @staticmethod
    def forward(ctx: Context, backend: ModuleType, guidance_scale: float, *tensors: Any) -> Tensor:
        ctx.backend, ctx.guidance_scale = backend, guidance_scale
        ctx.save_for_backward(*tensors)
        out: Tensor = backend.sums(Transitions._make([*tensors, guidance_scale]))
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Any:
        cond, uncond = ctx.needs_input_grad[2:4]
        saved = ctx.saved_tensors
        g, g_uncond = ctx.backend.gradient(
            Transitions._make([*saved, ctx.guidance_scale]), grad, cond, uncond
        )
        if ctx.backend.FUSED:
            g = _once(ctx.backend.NAME, g, grad, *saved[:2])
            g_uncond = _once(ctx.backend.NAME, g_uncond, grad, *saved[:2])
        return (None, None, g, g_uncond) + (None,) * (len(saved) - 2)


def transition_sums(backend: ModuleType, t: Transitions) -> Tensor:
    """[3, K, B] float64, differentiable in ``model_output`` and ``model_output_uncond``."""
    sums: Tensor = TransitionSums.apply(backend, t.guidance_scale, *t[:-1])
    return sums


class Problem(NamedTuple):
    """The [K, B] side of a fused call."""

    advantages: Tensor  # [K, B] float64 or float32, like the next two
    old_log_prob: Tensor | None  # [K, B]
    step_weights: Tensor | None  # [K, B]
    mean_std: Tensor | None  # [2, K] float64
    config: GuardConfig
    gaussian: bool


def _scaled(
    backend: ModuleType,
    t: Transitions,
    sum_grads: Tensor,  # [3, K, B] float64
    grad_output: Tensor,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, ...]:
    """The gradients for ``grad_output`` from the coefficients: one rounding, whatever the dtype."""
    coefficients = sum_grads * grad_output.detach().double()
    grads: tuple[Tensor | None, ...] = backend.gradient(t, coefficients, *wanted)
    return grads


class GuardLoss(torch.autograd.Function):
    """Fused loss and gradient: the forward computes both, the backward hands the gradient out.

    The buffer is handed out once, scaled in place by ``grad_output``, so that no second gradient is
    ever allocated. Another backward through the same graph (``retain_graph``), or one that scales a
    16-bit gradient, computes it anew from the coefficients; a float16 one, which a loss scale is
    to keep from underflowing, is not computed before the scale is known.
    """

    @staticmethod
    def forward(
        ctx: Context,
        backend: ModuleType,
        t: Transitions,  # of detached operands
        problem: Problem,
        plain: PlainCall | None,  # t and problem in C++
        wanted: tuple[bool, bool],
        model_output: Tensor,  # [K, B, *latent] or [B, *latent], like the next
        model_output_uncond: Tensor | None,
    ) -> Any:
        ctx.backend, ctx.wanted, ctx.guidance_scale = backend, wanted, t.guidance_scale
        ctx.set_materialize_grads(False)  # the diagnostics get none
        now = (False, False) if model_output.dtype == torch.float16 else wanted
        if plain is None:
            out = backend.guard_loss(t, *problem, *now)
        else:
            out = backend.guard_loss_plain(plain, *problem[3:], *now)
        loss, *buffers, per_row, metrics, ctx.sum_grads = out
        ctx.buffers = buffers if any(now) else None
        ctx.save_for_backward(model_output, model_output_uncond, *t[2:-1])
        ctx.mark_non_differentiable(per_row, metrics)
        return loss, per_row, metrics

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor | None, *_: Any) -> Any:
        saved = ctx.saved_tensors  # raises if one has changed, whether it is needed or not
        outputs = saved[:2]
        if grad_output is None:
            return (None,) * 7

        def transitions() -> Transitions:
            rows = ctx.sum_grads.shape[1:]
            flat = [None if x is None else flatten(x.detach(), *rows) for x in outputs]
            return Transitions._make([*flat, *saved[2:], ctx.guidance_scale])

        buffers, ctx.buffers = ctx.buffers, None
        if buffers is None:
            grads = _scaled(ctx.backend, transitions(), ctx.sum_grads, grad_output, ctx.wanted)
        else:
            grads = ctx.backend.scaled(
                transitions, ctx.sum_grads, buffers, grad_output.detach(), *ctx.wanted
            )
        handed = [
            _once(ctx.backend.NAME, grad.view(output.shape), grad_output, *outputs)
            if wanted and grad is not None
            else None
            for grad, output, wanted in zip(grads, outputs, ctx.wanted, strict=True)
        ]
        return (None,) * 5 + tuple(handed)


_FIELDS = tuple(field.name for field in dataclasses.fields(GuardConfig))


class TracedGuardLoss(torch.autograd.Function):
    """:class:`GuardLoss` without buffers that outlive a call: what ``torch.compile`` can trace."""

    @staticmethod
    def forward(
        ctx: Context,
        backend: ModuleType,
        guidance_scale: float,
        config: tuple[Any, ...],  # its fields: torch.compile of 2.9 takes symbolic numbers so alone
        gaussian: bool,
        wanted: tuple[bool, bool],
        *tensors: Any,  # Transitions' and Problem's
    ) -> Any:
        ctx.backend, ctx.wanted, ctx.guidance_scale = backend, wanted, guidance_scale
        ctx.deferred = tensors[0].dtype in (torch.float16, torch.bfloat16)
        t, rows = Transitions._make([*tensors[:-4], guidance_scale]), tensors[-4:]
        now = (False, False) if ctx.deferred else wanted
        loss, *buffers, per_row, metrics, sum_grads = backend.guard_loss(
            t, *rows, GuardConfig(*config), gaussian, *now
        )
        ctx.rest = len(tensors) - 2
        ctx.save_for_backward(*([sum_grads, *t[:-1]] if ctx.deferred else buffers))
        ctx.mark_non_differentiable(per_row, metrics)
        return loss, per_row, metrics

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor, *_: Any) -> Any:
        if ctx.deferred:
            sum_grads, *tensors = ctx.saved_tensors
            t = Transitions._make([*tensors, ctx.guidance_scale])
            grads = _scaled(ctx.backend, t, sum_grads, grad_output, ctx.wanted)
        else:
            grads = tuple(grad * grad_output for grad in ctx.saved_tensors)
        handed = [g if wanted else None for g, wanted in zip(grads, ctx.wanted, strict=True)]
        return (None,) * 5 + (*handed,) + (None,) * ctx.rest


def guard_loss(
    backend: ModuleType,
    t: Transitions,  # of what requires no grad, but for compiling
    problem: Problem,
    plain: PlainCall | None,
    model_output: Tensor,  # [K, B, *latent] or [B, *latent], like the next
    model_output_uncond: Tensor | None,
) -> Any:
    """(loss [], per_row [4, K, B], metrics [10, K]) of a fused backend."""
    outputs = (model_output, model_output_uncond)
    cond, uncond = (x is not None and x.requires_grad and torch.is_grad_enabled() for x in outputs)
    if torch.compiler.is_compiling():
        *rows, config, gaussian = problem
        fields = tuple(getattr(config, name) for name in _FIELDS)
        return TracedGuardLoss.apply(
            backend, t.guidance_scale, fields, gaussian, (cond, uncond), *t[:-1], *rows
        )
    return GuardLoss.apply(backend, t, problem, plain, (cond, uncond), *outputs)
