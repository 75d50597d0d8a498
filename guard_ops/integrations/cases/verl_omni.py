"""verl-omni: ``FlowMatchSDEDiscreteScheduler.sample_previous_step``."""

from __future__ import annotations

from typing import Any

import torch

from ..proof import OMITTED, Cases
from . import operands


def step(owner: Any) -> Cases:
    """With the scheduler's own position in its loop, and with a timestep for each sample."""
    scheduler = owner(shift=3.0)
    scheduler.set_timesteps(operands.STEPS)

    def build(chosen: dict[str, Any]) -> dict[str, Any]:
        v, x, y = operands.transition(chosen)
        one = {"own first": 0, "own middle": 3}.get(chosen["_steps"])
        scheduler._step_index = one
        timestep = None
        if one is None:
            timestep = scheduler.timesteps[operands.step_numbers(chosen["_steps"])]
        return {
            "self": scheduler,
            "sample": x,
            "model_output": v,
            "timestep": timestep,
            "generator": operands.generators(chosen["_sampling"]),
            "prev_sample": y,
            **operands.optional(chosen),
        }

    options = {
        "_sampling": operands.SAMPLING,
        "_learns": operands.LEARNS,
        "sde_type": (OMITTED, "sde", "cps", "dance_sde"),
        "noise_level": (OMITTED, 0.7, 0.3),
        "return_logprobs": (OMITTED, False),
        "return_sqrt_dt": (OMITTED, False, True),
        "include_logprob_normalizer": (OMITTED, False),
        "_steps": ("mixed", "first", "middle", "last", "own first", "own middle"),
        "_shape": ((6, 8), (4, 4, 4), (2, 2, 4, 4)),
        "_dtype": (torch.float32,),  # the original asserts it
    }
    return Cases(options, build)
