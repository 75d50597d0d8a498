"""The calls that are compared: an op by name, with its arguments, as a process can be sent it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import guard_ops as go


class Call(NamedTuple):
    """``extra``: what a gradient is made with, the loss's factor or the results' cotangents."""

    op: str
    arguments: dict[str, Any]
    extra: Any = None


def run(call: Call) -> dict[str, Tensor]:
    """All results by name, gradients included, metrics beside the others."""
    return OPERATIONS[call.op](dict(call.arguments), call.extra)


def _leaves(arguments: dict[str, Any]) -> list[Tensor]:
    """Makes both model outputs require grad, in place of what was given."""
    names = ["model_output"]
    if arguments.get("model_output_uncond") is not None:
        names.append("model_output_uncond")
    for name in names:
        arguments[name] = arguments[name].detach().requires_grad_()
    return [arguments[name] for name in names]


def _named(grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(("grad", "grad_uncond"), grads))  # noqa: B905, one without guidance


def _loss(arguments: dict[str, Any], factor: float) -> dict[str, Tensor]:
    leaves = _leaves(arguments)
    out = go.guard_loss(**arguments)
    grads = torch.autograd.grad(out.loss * factor, leaves)
    results = out._asdict() | out.metrics._asdict() | _named(grads)
    del results["metrics"]
    return {name: value.detach() for name, value in results.items()}


def _loss_and_grad(arguments: dict[str, Any], _: None) -> dict[str, Tensor]:
    out = go.guard_loss_and_grad(**arguments)
    grads = out.grad if isinstance(out.grad, tuple) else (out.grad,)
    results = out._asdict() | out.metrics._asdict() | _named(grads)
    del results["metrics"]
    return results


def _log_ratio(arguments: dict[str, Any], cotangents: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    leaves = _leaves(arguments)
    out = go.log_ratio(**arguments)
    pairs = [(x, c) for x, c in zip(out, cotangents, strict=True) if x.requires_grad]
    grads = torch.autograd.grad(
        [x for x, _ in pairs], leaves, [c.to(out.log_ratio.dtype) for _, c in pairs]
    )
    return {name: x.detach() for name, x in out._asdict().items()} | _named(grads)


def _log_prob(arguments: dict[str, Any], cotangent: Tensor) -> dict[str, Tensor]:
    leaves = _leaves(arguments)
    out = go.log_prob(**arguments)
    return {"log_prob": out.detach()} | _named(
        torch.autograd.grad(out, leaves, cotangent.to(out.dtype))
    )


def _sde_step(arguments: dict[str, Any], _: None) -> dict[str, Tensor]:
    out = go.sde_step(**arguments)
    return {name: x for name, x in out._asdict().items() if x is not None}


OPERATIONS = {
    "guard_loss": _loss,
    "guard_loss_and_grad": _loss_and_grad,
    "log_ratio": _log_ratio,
    "log_prob": _log_prob,
    "sde_step": _sde_step,
}
