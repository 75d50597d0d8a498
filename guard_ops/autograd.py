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


class GuardLoss(torch.autograd.Function):
    """Fused loss and gradient: the forward computes both, the backward hands the gradient out.

    The buffer is handed out once, scaled in place by ``grad_output``, so that no second gradient is
    ever allocated; another backward through the same graph (``retain_graph``) computes it anew.
    """

    @staticmethod
    def forward(ctx: Context, call: Call, *tensors: Any) -> Any:
        loss, grad, grad_uncond, per_row, metrics = call(*tensors)
        ctx.call, ctx.buffers = call, (grad, grad_uncond)
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(per_row, metrics)
        return loss, per_row, metrics

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor, *_: Any) -> Any:
        tensors, call = ctx.saved_tensors, ctx.call
        buffers, ctx.buffers = ctx.buffers, None
        if buffers is None:
            buffers = call(*tensors)[1:3]
        grads = []
        for buffer, wanted in zip(buffers, (call.cond, call.uncond), strict=True):
            grad = call.backend.scale_(buffer, grad_output.detach()) if wanted else None
            grads.append(_once(call.backend.NAME, grad, grad_output, *tensors[:2]))
        return (None, *grads) + (None,) * (len(tensors) - 2)


class TracedGuardLoss(torch.autograd.Function):
    """:class:`GuardLoss` without buffers that outlive a call: what ``torch.compile`` can trace."""

    @staticmethod
    def forward(ctx: Context, call: Call, *tensors: Any) -> Any:
        loss, grad, grad_uncond, per_row, metrics = call(*tensors)
        ctx.wanted, ctx.rest = (call.cond, call.uncond), len(tensors) - 2
        ctx.save_for_backward(grad, grad_uncond)
        ctx.mark_non_differentiable(per_row, metrics)
        return loss, per_row, metrics

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor, *_: Any) -> Any:
        grads = [
            (grad * grad_output).to(grad.dtype) if wanted else None
            for grad, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
        ]
        return (None, *grads) + (None,) * ctx.rest


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
