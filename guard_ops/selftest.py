"""Checks what a backend computes on a small problem against ``reference``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

from . import GuardConfig, SdeSchedule, guard_loss_and_grad, log_ratio, philox_seed, sde_step
from .backends import select, use_backend

# The largest norm of an error, relative to the norm of the right result. In float32 the reference
# itself is off by 1e-7.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
SIGMAS = (1.0, 0.9, 0.6, 0.2, 0.0)


def self_test(backend: str) -> str:
    """``ok``, or by how much results differ from what they should be.

    ``reference`` is compared with torch.distributions, and every other backend with ``reference``
    in float64 on the CPU, which gets the same rounded inputs.
    """
    try:
        device, dtype = _where(backend)
        with use_backend(backend):
            case = _case(dtype, device, dtype)
            ours = [_log_ratio(case)] if backend == "reference" else _everything(case)
        with use_backend("reference"):
            case = _case(dtype, torch.device("cpu"), torch.float64)
            truth = [_density_ratio(case)] if backend == "reference" else _everything(case)
    except Exception as error:  # a compiler may raise a class of its own
        return f"failed: {error}"
    errors = [
        float((a.cpu().double() - b).norm() / b.norm()) for a, b in zip(ours, truth, strict=True)
    ]
    worst = max(errors, key=lambda e: (e != e, e))  # a NaN counts as the worst
    return "ok" if worst <= TOLERANCE[dtype] else f"off by {worst:.1e} (relative)"


def _where(backend: str) -> tuple[torch.device, torch.dtype]:
    """The device that the backend runs on here, and the widest type that it takes."""
    for name in ("cpu", "cuda", "xpu"):
        device = torch.device(name)
        try:
            with use_backend(backend):
                select(device)
        except ValueError:
            continue
        wide = backend in ("reference", "cpu")
        return device, torch.float64 if wide else torch.float32
    raise ValueError("it supports none of cpu, cuda and xpu")


def _case(rounding: torch.dtype, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Three steps of four small latents, rounded to ``rounding`` and given as ``dtype``."""
    generator = torch.Generator().manual_seed(0)

    def latents() -> Tensor:
        return torch.randn(3, 4, 4, 33, dtype=torch.float64, generator=generator)

    def rounded(x: Tensor) -> Tensor:
        return x.to(rounding).to(device, dtype)

    old = latents()
    return {
        "model_output": rounded(old + 1e-3 * latents()),
        "old_model_output": rounded(old),
        "noise": rounded(latents()),
        "coeffs": SdeSchedule(SIGMAS, device=device)[:3],
    }


def _log_ratio(case: dict[str, Any]) -> Tensor:
    return log_ratio(**case).log_ratio


def _everything(case: dict[str, Any]) -> list[Tensor]:
    """The ratio, loss and gradient of both kinds of GRPO-Guard, and a rollout's step."""
    v = case["model_output"]
    advantages = torch.tensor([1.0, -0.5, 2.0, -1.5], dtype=v.dtype, device=v.device)
    out: list[Any] = [_log_ratio(case)]
    for config in (GuardConfig.article(), GuardConfig.paper()):
        found = guard_loss_and_grad(**case, advantages=advantages, config=config)
        out += [found.loss, found.grad]
    seed = philox_seed(1, v.shape[:2], v.device)
    for source in ({"noise": case["noise"]}, {"seed": seed}):
        step: Any = sde_step(v, case["old_model_output"], case["coeffs"], **source)
        out += [step.prev_sample, step.mean, step.log_prob]
    return out


def _density_ratio(case: dict[str, Any]) -> Any:
    """``log r`` as the difference of two log-densities, which float64 can afford."""
    x = torch.zeros_like(case["noise"])  # cancels
    coeffs = case["coeffs"]
    a, b, s = (c.reshape(3, 1, 1, 1) for c in (coeffs.a, coeffs.b, coeffs.s))
    old, new = a * x + b * case["old_model_output"], a * x + b * case["model_output"]
    y = old + s * case["noise"]
    difference = Normal(new, s).log_prob(y) - Normal(old, s).log_prob(y)
    return difference.flatten(2).mean(-1)
