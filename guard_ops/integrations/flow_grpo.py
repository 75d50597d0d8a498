"""flow_grpo (github.com/yifan123/flow_grpo): its SDE step, and its training scripts' tails."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..schedule import SdeKind, StepCoefficients
from . import guard, steps
from .guard import BiasReduction

KINDS: dict[str, SdeKind] = {"sde": "flow_sde", "cps": "cps"}


def sde_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: float | Tensor,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: Any = None,
    sde_type: str | None = "sde",
    return_sqrt_dt: bool | None = False,
) -> tuple[Tensor, ...]:
    """``flow_grpo.diffusers_patch.sd3_sde_with_logprob.sde_step_with_logprob`` on fused ops.

    Args:
        self: the diffusers flow-matching scheduler, after ``set_timesteps``.
        model_output: velocity, [B, *latent], any floating dtype.
        timestep: [B], values of ``self.timesteps``.
        sample: x, [B, *latent].
        prev_sample: y; the log-prob and the mean then carry gradients. None draws it.
        generator: draws the noise; a generator, or one per sample.
        sde_type: "sde" or "cps".

    Returns:
        prev_sample, log_prob [B], prev_sample_mean, std_dev_t [B, 1, ...], and, if asked for,
        sqrt(-dt) [B, 1, ...]; float32. The noise is drawn as the original draws it.

    Raises:
        ValueError: ``sde_type`` is neither, or (on the CPU) a timestep is not in the schedule.
    """
    if sde_type not in KINDS:
        raise ValueError(f"`sde_type` is {sde_type!r}; it needs one of {', '.join(KINDS)}")
    wanted = torch.as_tensor(timestep)
    index = steps.index_for_timestep(self.timesteps, wanted)
    coeffs = steps.coefficients(
        self.sigmas, index, noise_level, KINDS[sde_type], len(sample), sample.device
    )
    step = steps.sde_step(
        model_output,
        sample.float(),
        coeffs,
        None if prev_sample is None else prev_sample.float(),
        lambda: draw_noise(model_output, generator),
    )
    std, sqrt_dt = std_and_sqrt_dt(coeffs, KINDS[sde_type], sample)
    assert step.log_prob is not None
    out = (step.prev_sample, step.log_prob, step.mean, std)
    return (*out, sqrt_dt) if return_sqrt_dt else out


def std_and_sqrt_dt(
    coeffs: StepCoefficients, kind: SdeKind, sample: Tensor
) -> tuple[Tensor, Tensor]:
    """``std_dev_t`` as the public implementations return it, and sqrt(-dt), both [B, 1, ...].

    The one of Flow-SDE leaves sqrt(-dt) out; the others are the density's standard deviation.
    """
    sqrt_dt = (-coeffs.dt).sqrt()
    std = coeffs.s / sqrt_dt if kind == "flow_sde" else coeffs.s
    return steps.per_sample(std, sample), steps.per_sample(sqrt_dt, sample)


def draw_noise(like: Tensor, generator: Any) -> Tensor:
    """Noise drawn as the originals draw it: float32, the same numbers from the same generators."""
    from diffusers.utils.torch_utils import randn_tensor

    noise: Tensor = randn_tensor(
        like.shape, generator=generator, device=like.device, dtype=torch.float32
    )
    return noise


class PolicyLoss(NamedTuple):
    """The tail of a training script: the loss, and what the script logs (tensors, no host sync)."""

    loss: Tensor  # []
    info: dict[str, Tensor]


def grpo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    clip_range: float,
    adv_clip_max: float = 5.0,
) -> PolicyLoss:
    """The tail of ``scripts/train_*.py``: ``ratio = exp(log_prob - old_log_prob)``, clipped.

    Args:
        log_prob, old_log_prob, advantages: [B].
    """
    log_ratio = log_prob.double() - old_log_prob.double()
    found = guard.plain_surrogate(
        log_ratio,
        advantages,
        clip_low=clip_range,
        clip_high=clip_range,
        adv_clip=adv_clip_max,
    )
    return PolicyLoss(found.loss, _info(found, log_ratio, clip_range))


def grpo_guard_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    prev_sample_mean: Tensor,
    old_prev_sample_mean: Tensor,
    std_dev_t: Tensor,
    sqrt_dt: Tensor,
    advantages: Tensor,
    *,
    clip_range: float,
    adv_clip_max: float = 5.0,
    bias_reduction: BiasReduction = "sample",
) -> PolicyLoss:
    """The tail of the GRPO-Guard scripts, on what the step returned.

    The scale ``sqrt_dt.mean() * std_dev_t.mean()`` is averaged over the batch, as in the scripts.

    Args:
        log_prob, old_log_prob, advantages: [B]. prev_sample_mean: as the step returned it.
        old_prev_sample_mean: the rollout's, [B, *latent]. std_dev_t, sqrt_dt: [B, 1, ...].
        bias_reduction: "batch" reproduces the published script, whose bias is one number for the
            whole batch (its issue 244); "sample" is what the paper says.
    """
    moved = guard.difference(prev_sample_mean, old_prev_sample_mean, log_prob, old_log_prob)
    found = guard.averaged_surrogate(
        moved,
        advantages,
        std_dev_t,
        sqrt_dt,
        clip=clip_range,
        adv_clip=adv_clip_max,
        bias_reduction=bias_reduction,
    )
    return PolicyLoss(found.loss, _info(found, moved.log_ratio, clip_range))


def _info(found: guard.Surrogate, log_ratio: Tensor, clip_range: float) -> dict[str, Tensor]:
    excess = found.excess
    return {
        "approx_kl": 0.5 * log_ratio.detach().square().mean(),
        "clipfrac": (excess.abs() > clip_range).double().mean(),
        "clipfrac_gt_one": (excess > clip_range).double().mean(),
        "clipfrac_lt_one": (excess < -clip_range).double().mean(),
        "policy_loss": found.losses.mean(),
        "ratio_bias": excess.mean(),
        "ratio_std": excess.std(correction=0),
    }
