"""The torch.autograd.Functions over the chosen backend."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import GuardConfig
from .transitions import Transitions

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


class Call(NamedTuple):
    """A fused call but for its tensors."""

    backend: ModuleType
    guidance_scale: float
    config: GuardConfig
    gaussian: bool
    cond: bool  # whether to compute the gradient of model_output
    uncond: bool  # and of model_output_uncond

    def __call__(self, *tensors: Any) -> Any:
        """The backend's ``guard_loss`` of Transitions' tensors and the four [K, B] ones."""
        t = Transitions._make([*tensors[:-4], self.guidance_scale])
        return self.backend.guard_loss(t, *tensors[-4:], *self[2:])


def _transitions(ctx: Context, tensors: Any) -> Transitions:
    return Transitions._make([*tensors[: len(Transitions._fields) - 1], ctx.call.guidance_scale])


def _scaled(ctx: Context, grad_output: Tensor, tensors: Any) -> tuple[Tensor | None, ...]:
    """The gradients for ``grad_output`` from the coefficients: one rounding, whatever the dtype."""
    coefficients = ctx.sum_grads * grad_output.detach().double()
    grads: tuple[Tensor | None, ...] = ctx.call.backend.gradient(
        _transitions(ctx, tensors), coefficients, *ctx.wanted
    )
    return grads


class GuardLoss(torch.autograd.Function):
    """Fused loss and gradient: the forward computes both, the backward hands the gradient out.

    The buffer is handed out once, scaled in place by ``grad_output``, so that no second gradient is
    ever allocated. Another backward through the same graph (``retain_graph``), or one that scales a
    16-bit gradient, computes it anew from the coefficients; a float16 one, which a loss scale is
    to keep from underflowing, is not computed before the scale is known.
    """

    @staticmethod
    def forward(ctx: Context, call: Call, *tensors: Any) -> Any:
        ctx.call, ctx.wanted = call, (call.cond, call.uncond)
        if tensors[0].dtype == torch.float16:
            call = call._replace(cond=False, uncond=False)
        loss, *buffers, per_row, metrics, ctx.sum_grads = call(*tensors)
        ctx.buffers = buffers if call.cond or call.uncond else None
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(per_row, metrics)
        return loss, per_row, metrics

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor, *_: Any) -> Any:
        tensors = ctx.saved_tensors
        buffers, ctx.buffers = ctx.buffers, None
        if buffers is None:
            grads = _scaled(ctx, grad_output, tensors)
        else:
            t = _transitions(ctx, tensors)
            grads = ctx.call.backend.scaled(
                t, ctx.sum_grads, buffers, grad_output.detach(), *ctx.wanted
            )
        name = ctx.call.backend.NAME
        handed = [
            _once(name, grad if wanted else None, grad_output, *tensors[:2])
            for grad, wanted in zip(grads, ctx.wanted, strict=True)
        ]
        return (None, *handed) + (None,) * (len(tensors) - 2)


class TracedGuardLoss(torch.autograd.Function):
    """:class:`GuardLoss` without buffers that outlive a call: what ``torch.compile`` can trace."""

    @staticmethod
    def forward(ctx: Context, call: Call, *tensors: Any) -> Any:
        ctx.call, ctx.wanted = call, (call.cond, call.uncond)
        ctx.deferred = tensors[0].dtype in (torch.float16, torch.bfloat16)
        if ctx.deferred:
            call = call._replace(cond=False, uncond=False)
        loss, *buffers, per_row, metrics, sum_grads = call(*tensors)
        ctx.rest = len(tensors) - 2
        ctx.save_for_backward(*([sum_grads, *tensors] if ctx.deferred else buffers))
        ctx.mark_non_differentiable(per_row, metrics)
        return loss, per_row, metrics

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor, *_: Any) -> Any:
        if ctx.deferred:
            ctx.sum_grads, *tensors = ctx.saved_tensors
            grads = _scaled(ctx, grad_output, tensors)
        else:
            grads = tuple(grad * grad_output for grad in ctx.saved_tensors)
        handed = [g if wanted else None for g, wanted in zip(grads, ctx.wanted, strict=True)]
        return (None, *handed) + (None,) * ctx.rest


def guard_loss(
    backend: ModuleType,
    t: Transitions,
    advantages: Tensor,  # [K, B]
    old_log_prob: Tensor | None,  # [K, B]
    step_weights: Tensor | None,  # [K, B]
    mean_std: Tensor | None,  # [2, K] float64
    config: GuardConfig,
    gaussian: bool,
) -> Any:
    """(loss [], per_row [4, K, B], metrics [10, K]) of a fused backend."""
    wanted = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in t[:2]]
    call = Call(backend, t.guidance_scale, config, gaussian, *wanted)
    tensors = (*t[:-1], advantages, old_log_prob, step_weights, mean_std)
    if torch.compiler.is_compiling():
        return TracedGuardLoss.apply(call, *tensors)
    return GuardLoss.apply(call, *tensors)
