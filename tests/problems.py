"""Random problems in each of the five forms, and what several test files compare them with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import guard_ops as go
from guard_ops.transitions import FORMS as OPERANDS
from guard_ops.transitions import Latents

FORMS = tuple(OPERANDS)  # mean, velocity, noise, seeded, log-prob
EXACT_ON_POLICY = ("mean", "velocity", "noise", "seeded")
SIGMAS = (1.0, 0.9, 0.75, 0.55, 0.3, 0.1, 0.0)
Problem = dict[str, Any]  # keyword arguments of guard_loss


def schedule(kind: str = "flow_sde") -> go.SdeSchedule:
    return go.SdeSchedule(SIGMAS, noise_level=0.7, kind=kind)


def problem(
    form: str = "velocity",
    *,
    steps: int | None = 3,  # None: one step, [B, *latent]
    batch: int = 4,
    latent: tuple[int, ...] = (6, 5),
    dtype: torch.dtype = torch.float64,
    drift: float = 0.1,  # of the velocity; 0 is on policy, bit for bit
    kind: str = "flow_sde",
    guided: bool = False,
    reference: bool = False,
    seed: int = 0,
) -> Problem:
    """Arguments of ``guard_loss`` whose rollout is ``sde_step``'s on the backend in use."""
    generator = torch.Generator().manual_seed(seed)
    leading = (batch,) if steps is None else (steps, batch)

    def normal() -> Tensor:
        wide = torch.randn(*leading, *latent, generator=generator, dtype=torch.float64)
        return wide.to(dtype)

    coeffs = schedule(kind)[1 if steps is None else slice(1, 1 + steps)]
    x, old, moved = normal(), normal(), normal()
    v = old + drift * moved if drift else old.clone()
    source: Problem = {"noise": normal()}
    if form == "seeded":
        source = {"seed": go.philox_seed(7 + seed, leading)}
    step = go.sde_step(old, x, coeffs, **source)
    everything = {
        "sample": x,
        "prev_sample": step.prev_sample,
        "old_mean": step.mean,
        "old_model_output": old,
        "old_log_prob": step.log_prob,
        **source,
    }
    out = {name: everything[name] for name in OPERANDS[form]}
    out |= {"model_output": v, "coeffs": coeffs}
    out["advantages"] = torch.randn(batch, generator=generator, dtype=torch.float64).to(dtype)
    if guided:  # v = uncond + 2.5 (cond - uncond), so that the guided velocity moves by `drift`
        uncond = normal()
        out["model_output"] = (uncond + (v - uncond) / 2.5).to(dtype)
        out |= {"model_output_uncond": uncond, "guidance_scale": 2.5}
    if reference:
        out["ref_model_output"] = (old + 0.2 * normal()).to(dtype)
    return out


def arguments(given: Problem, **changes: Any) -> Problem:
    """``given`` with some arguments replaced; those set to None are left out."""
    return {name: value for name, value in {**given, **changes}.items() if value is not None}


def without_advantages(given: Problem) -> Problem:
    """What ``log_ratio`` takes."""
    return {name: value for name, value in given.items() if name != "advantages"}


def operands(given: Problem) -> tuple[Any, ...]:
    """What the registered operators take first: latents [K, B, D], seed, table, guidance scale."""
    steps, batch = given["model_output"].shape[:2]
    latents = [given.get(name) for name in Latents._fields]
    table = given["coeffs"].table.unsqueeze(-1).expand(5, steps, batch)
    flat = [None if x is None else x.flatten(2) for x in latents]
    return flat, given.get("seed"), table, given.get("guidance_scale", 1.0)


def step_operands(source: str, **given: Any) -> tuple[Any, ...]:
    """What the operators of a rollout's step take, its noise from ``source``: "noise" or "seed"."""
    of = problem("mean", **given)
    names = ("model_output", "model_output_uncond", "guidance_scale", "sample", "coeffs")
    step = {name: of[name] for name in names if name in of}
    shape = of["sample"].shape
    draw = torch.randn_like(of["sample"]) if source == "noise" else go.philox_seed(1, shape[:2])
    return operands(step | {source: draw})


def widened(given: Problem) -> Problem:
    """The same numbers in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }


def run(given: Problem, config: go.GuardConfig | None = None, **more: Any) -> tuple[Any, Tensor]:
    """``guard_loss``'s output and the gradient of ``model_output``."""
    v = given["model_output"].detach().requires_grad_()
    out = go.guard_loss(**{**given, "model_output": v}, config=config, **more)
    (grad,) = torch.autograd.grad(out.loss, v)
    return out, grad


def truth(given: Problem, config: go.GuardConfig | None = None, **more: Any) -> tuple[Any, Tensor]:
    """:func:`run` by ``reference`` in float64 on the same, already rounded, numbers."""
    with go.use_backend("reference"):
        return run(widened(given), config, **more)


def relative(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    size = expected.double().norm().item()
    distance = (got.double() - expected.double()).norm().item()
    return distance / size if size else distance


def largest(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference."""
    return (got.double() - expected.double()).abs().max().item()
