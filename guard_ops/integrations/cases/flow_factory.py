"""Flow-Factory: ``step`` of its Euler and of its UniPC scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..proof import OMITTED, Cases
from . import operands


def euler_step(owner: Any) -> Cases:
    """The scheduler of its image models."""
    return _step(lambda: owner(shift=3.0))


def unipc_step(owner: Any) -> Cases:
    """The scheduler of Wan's models."""
    return _step(
        lambda: owner(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    )


def _step(make: Callable[[], Any]) -> Cases:
    kept = make()
    kept.set_timesteps(operands.STEPS)

    def build(chosen: dict[str, Any]) -> dict[str, Any]:
        v, x, y = operands.transition(chosen)
        scheduler = kept
        if chosen["_evaluates"]:  # diffusers' own step remembers the ones before
            scheduler = make()
            scheduler.set_timesteps(operands.STEPS)
            scheduler.eval()
        numbers = operands.step_numbers(chosen["_steps"])
        timestep = scheduler.timesteps[numbers].float()
        ends = torch.cat([scheduler.timesteps, scheduler.timesteps.new_zeros(1)])
        following = ends[[k + 1 for k in numbers]].float()
        if chosen["_timestep"] == "one" or chosen["_evaluates"]:
            timestep, following = timestep[0], following[0]
        built = {
            "self": scheduler,
            "noise_pred": v,
            "timestep": timestep,
            "latents": x,
            "next_latents": y,
            "generator": operands.generators(chosen["_sampling"]),
            **operands.optional(chosen),
        }
        if chosen["_timestep"] == "its number":
            built["timestep"] = numbers[0]
        if chosen["_evaluates"]:
            built["compute_log_prob"] = False  # of a sample without noise it is 0 / 0
        if chosen["_timestep"] == "a pair":
            built |= {"timestep_next": following}
            built.setdefault("noise_level", 0.7)
        return built

    options = {
        "_sampling": operands.SAMPLING,
        "_learns": operands.LEARNS,
        "dynamics_type": (OMITTED, "Flow-SDE", "Dance-SDE", "CPS", "ODE"),
        "noise_level": (OMITTED, 0.7, 0.3),
        "compute_log_prob": (OMITTED, False),
        "return_dict": (OMITTED, False),
        "return_kwargs": (OMITTED, ["next_latents", "log_prob"]),
        "_timestep": ("looked up", "one", "its number", "a pair"),
        "_steps": ("mixed", "first", "middle", "last"),
        "_evaluates": (False, True),
        "_shape": ((4, 4, 4), (6, 8)),
        "_dtype": (torch.float32, torch.bfloat16),
    }
    return Cases(options, build)
