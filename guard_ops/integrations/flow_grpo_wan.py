"""flow_grpo's Wan2.1: the step of its own module, std linear in sigma, and its script's tail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..schedule import StepCoefficients
from . import steps, tail
from .flow_grpo import PolicyLoss, approx_kl, draw_noise, transition


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
        ValueError: both ``prev_sample`` and ``generator`` are given, or (where nothing is being
            compiled) the last sigma is not 0, or (on the CPU) a timestep is not in the schedule.
    """
    if prev_sample is not None and generator is not None:
        raise ValueError("`generator` and `prev_sample` are given, but only one of them has effect")
    coeffs = _coefficients(self, torch.as_tensor(timestep), sample)
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


def _coefficients(scheduler: Any, timestep: Tensor, like: Tensor) -> StepCoefficients:
    """[1, B] at ``timestep`` [B], on the device of ``like`` [B, *latent]."""
    sigmas = scheduler.sigmas
    if not torch.compiler.is_compiling():  # which knows no values
        last = steps.schedule_of(sigmas, 1.0, "wan_sde", like.device).sigmas[-1]
        if last != 0:
            raise ValueError(
                f"`scheduler.sigmas` ends at {last}; wan_sde needs sigmas that end at 0"
            )
    index = steps.index_for_timestep(scheduler.timesteps, timestep)
    return steps.coefficients(sigmas, index, 1.0, "wan_sde", len(like), like.device)


def training_loss(
    scheduler: Any,
    noise_pred: Tensor,
    sample: Mapping[str, Tensor],
    j: int,
    config: Any,
    noise_pred_ref: Tensor | None = None,
) -> PolicyLoss:
    """All that ``scripts/train_wan2_1.py`` does between velocity and ``accelerator.backward``.

    Its KL is divided by ``2 (std_dev_t sqrt(-dt))^2``, which makes it that of the two Gaussians, so
    one pass computes ratio and KL.

    Args:
        scheduler, noise_pred, sample, j, noise_pred_ref: as
            :func:`guard_ops.integrations.flow_grpo.training_loss`, of videos.
        config: its ``train.clip_range``, ``train.adv_clip_max`` and ``train.beta`` are read.

    Returns:
        PolicyLoss with the script's keys: approx_kl, clipfrac, policy_loss, kl_loss where beta > 0,
        loss.

    Raises:
        ValueError: the last sigma is not 0, beta > 0 without ``noise_pred_ref``, or (on the CPU) a
            timestep is not in the schedule.
    """
    coeffs = _coefficients(scheduler, sample["timesteps"][:, j], noise_pred)
    t, advantages, bounds = transition(
        noise_pred, sample, j, config, noise_pred_ref, coeffs, "old_log_prob"
    )
    beta = float(config.train.beta)
    found = tail.plain(t, advantages, bounds, kl_beta=beta)
    loss = policy_loss = found.loss.detach()
    info = {"approx_kl": approx_kl(found), "clipfrac": found.outside.sum()}
    if found.kl is not None:
        info["kl_loss"] = found.kl.mean()
        policy_loss = loss - beta * info["kl_loss"]
    return PolicyLoss(found.loss, info | {"policy_loss": policy_loss, "loss": loss})
