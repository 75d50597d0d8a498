"""flow_grpo's Wan2.1 step: ``sde_step_with_logprob`` of its own module, std linear in sigma."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import steps
from .flow_grpo import draw_noise


def sde_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: float | Tensor,
    sample: Tensor,
    prev_sample: Tensor | None = None,
    generator: Any = None,
    determistic: bool = False,
    return_pixel_log_prob: bool = False,
    return_dt_and_std_dev_t: bool = False,
) -> tuple[Tensor, ...]:
    """``flow_grpo.diffusers_patch.wan_pipeline_with_logprob.sde_step_with_logprob`` on fused ops.

    Args:
        self: diffusers' UniPC scheduler with flow sigmas that end at 0, after ``set_timesteps``.
        model_output: velocity, [B, *latent]. timestep: [B], values of ``self.timesteps``.
        sample: x. prev_sample: y; None draws it.
        determistic: (as it is spelled there) returns the ODE's sample, and its log-prob under the
            SDE; the noise is drawn all the same. return_pixel_log_prob: has no effect there either.

    Returns:
        prev_sample, log_prob [B], prev_sample_mean, and ``std * sqrt(-dt)`` [B, 1, ...], or with
        ``return_dt_and_std_dev_t`` std and sqrt(-dt); float32.

    Raises:
        ValueError: both ``prev_sample`` and ``generator`` are given, the last sigma is not 0, or
            (on the CPU) a timestep is not in the schedule.
    """
    if prev_sample is not None and generator is not None:
        raise ValueError("`generator` and `prev_sample` are given, but only one of them has effect")
    last = steps.schedule_of(self.sigmas, 1.0, "wan_sde", sample.device).sigmas[-1]
    if last != 0:
        raise ValueError(f"`self.sigmas` ends at {last}; wan_sde needs sigmas that end at 0")
    index = steps.index_for_timestep(self.timesteps, torch.as_tensor(timestep))
    coeffs = steps.coefficients(self.sigmas, index, 1.0, "wan_sde", len(sample), sample.device)
    x = sample.float()
    y = None if prev_sample is None else prev_sample.float()
    if determistic:
        if y is None:
            draw_noise(model_output, generator)
        y = torch.addcmul(x, steps.per_sample(coeffs.dt, x), model_output.float())
    step = steps.sde_step(model_output, x, coeffs, y, lambda: draw_noise(model_output, generator))
    assert step.log_prob is not None
    s, root = steps.per_sample(coeffs.s, x), steps.per_sample((-coeffs.dt).sqrt(), x)
    stds = (s / root, root) if return_dt_and_std_dev_t else (s,)
    return step.prev_sample if y is None else y, step.log_prob, step.mean, *stds
