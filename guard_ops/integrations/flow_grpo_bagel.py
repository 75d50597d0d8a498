"""flow_grpo's Bagel: the method ``_sde_step_with_logprob`` of its model, one sample a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import guard, steps
from .flow_grpo import KINDS, draw_noise


def sde_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: Tensor,
    prev_timestep: Tensor,
    d_timestep: Tensor,
    sample: Tensor,
    prev_sample: Tensor | None = None,
    generator: Any = None,
    sigma_max: Tensor | None = None,
    noise_level: float = 0.8,
    sde_type: str = "sde",
) -> tuple[Tensor, ...]:
    """``Bagel._sde_step_with_logprob`` on fused ops: all of ``sample`` is one latent.

    Args:
        model_output: velocity, of the shape of ``sample``. timestep, prev_timestep: sigma and the
            next one, [] or [1]. d_timestep: their difference, negative.
        sigma_max: the schedule's second sigma; "sde" needs it.
        sde_type: "sde" or "cps".

    Returns:
        prev_sample, log_prob [] without the Gaussian's constants, prev_sample_mean, std_dev_t of
        the shape of ``timestep``; float32.

    Raises:
        ValueError: ``sde_type`` is neither, "sde" has no ``sigma_max``, or both ``prev_sample`` and
            ``generator`` are given to it.
    """
    if sde_type not in KINDS:
        raise ValueError(f"`sde_type` is {sde_type!r}; it needs one of {', '.join(KINDS)}")
    if sde_type == "sde" and sigma_max is None:
        raise ValueError("`sigma_max` is None; sde_type 'sde' needs the schedule's second sigma")
    if sde_type == "sde" and prev_sample is not None and generator is not None:
        raise ValueError("`generator` and `prev_sample` are given, but only one of them has effect")
    kind = KINDS[sde_type]
    following = prev_timestep if sde_type == "cps" else timestep.double() + d_timestep
    coeffs = steps.coefficients_at(
        timestep,
        following.reshape(timestep.shape),
        noise_level,
        kind,
        (timestep if sigma_max is None else sigma_max).reshape(()),
        1,
    )
    step = steps.sde_step(
        model_output.unsqueeze(0),
        sample.float().unsqueeze(0),
        coeffs,
        None if prev_sample is None else prev_sample.float().unsqueeze(0),
        lambda: draw_noise(model_output, generator).unsqueeze(0),
    )
    log_prob, std = step.log_prob, coeffs.s
    assert log_prob is not None
    if kind == "flow_sde":
        log_prob = log_prob + (coeffs.s.log() + guard.LOG_SQRT_2PI).float().squeeze(0)
        std = coeffs.s / (-coeffs.dt).sqrt()
    return (
        step.prev_sample.squeeze(0),
        log_prob.squeeze(0),
        step.mean.squeeze(0),
        std.float().reshape(torch.as_tensor(timestep).shape),
    )
