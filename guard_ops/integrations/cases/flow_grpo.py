"""flow_grpo: the step of its image models, Wan2.1's and Bagel's."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch

from ..proof import OMITTED, Cases
from . import operands

DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def _euler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(operands.STEPS)
    return scheduler


@functools.cache
def _unipc() -> Any:
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(operands.STEPS)
    return scheduler


def _scheduler_step(scheduler: Any, chosen: dict[str, Any]) -> dict[str, Any]:
    v, x, y = operands.transition(chosen)
    return {
        "self": copy.copy(scheduler),
        "model_output": v,
        "timestep": scheduler.timesteps[operands.step_numbers(chosen["_steps"])],
        "sample": x,
        "prev_sample": y,
        "generator": operands.generators(chosen["_sampling"]),
        **operands.optional(chosen),
    }


def step(owner: Any) -> Cases:
    """``sde_step_with_logprob`` of the image models."""
    options = {
        "_sampling": operands.SAMPLING,
        "_learns": operands.LEARNS,
        "sde_type": (OMITTED, "sde", "cps"),
        "noise_level": (OMITTED, 0.7, 0.3),
        "return_sqrt_dt": (OMITTED, False, True),
        "_steps": ("mixed", "first", "middle", "last"),
        "_shape": ((4, 4, 4), (6, 8)),
        "_dtype": DTYPES,
    }
    return Cases(options, lambda chosen: _scheduler_step(_euler(), chosen))


def wan_step(owner: Any) -> Cases:
    """``sde_step_with_logprob`` of Wan2.1, whose latents are videos."""
    options = {
        "_sampling": operands.SAMPLING,
        "_learns": operands.LEARNS,
        "determistic": (OMITTED, False, True),
        "return_pixel_log_prob": (OMITTED, True),
        "return_dt_and_std_dev_t": (OMITTED, False, True),
        "_steps": ("mixed", "first", "middle", "last"),
        "_shape": ((2, 2, 4, 4),),
        "_dtype": DTYPES,
    }
    return Cases(options, lambda chosen: _scheduler_step(_unipc(), chosen))


def bagel_step(owner: Any) -> Cases:
    """``Bagel._sde_step_with_logprob``: one latent [tokens, channels], sigmas instead of steps."""
    sigmas = _euler().sigmas

    def build(chosen: dict[str, Any]) -> dict[str, Any]:
        v, x, y = operands.transition(chosen)
        k = {"first": 0, "middle": 3, "last": operands.STEPS - 1}[chosen["_steps"]]
        change = sigmas[k + 1] - sigmas[k]
        return {
            "self": object(),
            "model_output": v,
            "timestep": sigmas[k],
            "prev_timestep": sigmas[k + 1],
            "d_timestep": change.reshape(1) if chosen["_change"] == "[1]" else change,
            "sample": x,
            "prev_sample": y,
            "generator": operands.generators(chosen["_sampling"]),
            "sigma_max": sigmas[1],
            **operands.optional(chosen),
        }

    options = {
        "_sampling": ("given", "its default", "a generator"),
        "_learns": operands.LEARNS,
        "sde_type": (OMITTED, "sde", "cps"),
        "noise_level": (OMITTED, 0.7, 0.3),
        "_steps": ("first", "middle", "last"),
        "_change": ("[1]", "[]"),
        "_shape": ((8,),),
        "_dtype": DTYPES,
    }
    return Cases(options, build)
