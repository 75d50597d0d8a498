"""The plain-PyTorch chains that trainers run today, against which guard_ops is raced.

The public implementations come first, written as they compute: an SDE step that returns the
log-prob of the stored next latent (flow_grpo ``sde_step_with_logprob``, DanceGRPO ``flux_step``,
verl-omni's scheduler for all three kinds) and the losses over it. Then come the three objectives of
guard_ops as a user of those implementations would write them. Gradients are autograd's, as users
run them.

Every public trainer stores the rollout's log-prob ([B] numbers a step) and reads it back, so a
chain is given ``old_log_prob``, which costs nothing here. verl-omni's GRPO-Guard also stores the
rollout's mean and forms its difference from the new one over whole latents. A user who holds the
mean but not the log-prob (exactly what guard_ops' mean form is given) calls
:func:`stored_log_prob` first; that is a contender of its own, not part of the others. Inputs are
upcast to float32 as flow_grpo and verl-omni do. float64 stays, so that tests can check the chains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """A scheduler's numbers for the N transitions of a batch, shaped to broadcast over latents."""

    sigma: Tensor  # [N, 1, ...]
    sigma_next: Tensor  # [N, 1, ...]
    sigma_max: Tensor  # [] sigmas[1], which replaces sigma where that is 1
    noise_level: float


class StepOutput(NamedTuple):
    """What an SDE step returns to the trainer; ``s`` is the density's standard deviation."""

    log_prob: Tensor  # [N], mean over the latent
    prev_sample_mean: Tensor  # [N, *latent]
    std_dev_t: Tensor  # [N, 1, ...] as the implementation returns it
    sqrt_dt: Tensor  # [N, 1, ...] sqrt(-dt)
    s: Tensor  # [N, 1, ...]


SdeStep = Callable[[Tensor, Tensor, Tensor, Step], StepOutput]


def scheduler_step(sigmas: Tensor, index: Tensor, noise_level: float, latent_dims: int) -> Step:
    """Look the transitions' sigmas up. sigmas: [N_steps + 1]; index: [N] int64."""
    shape = (-1, *[1] * latent_dims)
    return Step(
        sigmas[index].view(shape), sigmas[index + 1].view(shape), sigmas[1], float(noise_level)
    )


def flow_sde_step(
    model_output: Tensor,  # [N, *latent] v
    sample: Tensor,  # [N, *latent] x
    prev_sample: Tensor,  # [N, *latent] y
    step: Step,
) -> StepOutput:
    """Flow-GRPO's step (flow_grpo, verl-omni "sde")."""
    model_output, sample, prev_sample = map(_upcast, (model_output, sample, prev_sample))
    sigma, dt = step.sigma, step.sigma_next - step.sigma
    std_dev_t = torch.sqrt(sigma / (1 - torch.where(sigma == 1, step.sigma_max, sigma)))
    std_dev_t = std_dev_t * step.noise_level
    mean = (
        sample * (1 + std_dev_t**2 / (2 * sigma) * dt)
        + model_output * (1 + std_dev_t**2 * (1 - sigma) / (2 * sigma)) * dt
    )
    sqrt_dt = torch.sqrt(-1 * dt)
    s = std_dev_t * sqrt_dt
    return StepOutput(_gaussian_log_prob(prev_sample, mean, s), mean, std_dev_t, sqrt_dt, s)


def dance_sde_step(
    model_output: Tensor,  # [N, *latent] v
    sample: Tensor,  # [N, *latent] x
    prev_sample: Tensor,  # [N, *latent] y
    step: Step,
) -> StepOutput:
    """DanceGRPO's ``flux_step`` (verl-omni "dance_sde"); its ``std_dev_t`` contains sqrt(-dt)."""
    model_output, sample, prev_sample = map(_upcast, (model_output, sample, prev_sample))
    sigma, dt = step.sigma, step.sigma_next - step.sigma
    mean = sample + dt * model_output
    pred_original_sample = sample - sigma * model_output
    score_estimate = -(sample - pred_original_sample * (1 - sigma)) / sigma**2
    mean = mean + -0.5 * step.noise_level**2 * score_estimate * dt
    sqrt_dt = torch.sqrt(-1 * dt)
    s = step.noise_level * sqrt_dt
    return StepOutput(_gaussian_log_prob(prev_sample, mean, s), mean, s, sqrt_dt, s)


def cps_step(
    model_output: Tensor,  # [N, *latent] v
    sample: Tensor,  # [N, *latent] x
    prev_sample: Tensor,  # [N, *latent] y
    step: Step,
) -> StepOutput:
    """Coefficient-preserving sampling (verl-omni "cps"): its log-prob drops scale and constants."""
    model_output, sample, prev_sample = map(_upcast, (model_output, sample, prev_sample))
    sigma, sigma_next = step.sigma, step.sigma_next
    s = sigma_next * math.sin(step.noise_level * math.pi / 2)
    pred_original_sample = sample - sigma * model_output
    noise_estimate = sample + model_output * (1 - sigma)
    mean = pred_original_sample * (1 - sigma_next) + noise_estimate * torch.sqrt(
        sigma_next**2 - s**2
    )
    log_prob = -((prev_sample.detach() - mean) ** 2)
    return StepOutput(_latent_mean(log_prob), mean, s, torch.sqrt(sigma - sigma_next), s)


def wan_sde_step(
    model_output: Tensor,  # [N, *latent] v
    sample: Tensor,  # [N, *latent] x
    prev_sample: Tensor,  # [N, *latent] y
    step: Step,
) -> StepOutput:
    """flow_grpo's step of Wan2.1, whose noise level is 1; its last sigma is 0."""
    model_output, sample, prev_sample = map(_upcast, (model_output, sample, prev_sample))
    sigma, dt = step.sigma, step.sigma_next - step.sigma
    std_dev_t = step.noise_level * step.sigma_max * sigma
    mean = (
        sample * (1 + std_dev_t**2 / (2 * sigma) * dt)
        + model_output * (1 + std_dev_t**2 * (1 - sigma) / (2 * sigma)) * dt
    )
    sqrt_dt = torch.sqrt(-1 * dt)
    s = std_dev_t * sqrt_dt
    return StepOutput(_gaussian_log_prob(prev_sample, mean, s), mean, std_dev_t, sqrt_dt, s)


SDE_STEPS: dict[str, SdeStep] = {
    "flow_sde": flow_sde_step,
    "dance_sde": dance_sde_step,
    "wan_sde": wan_sde_step,
    "cps": cps_step,
}


def stored_log_prob(prev_sample: Tensor, old_mean: Tensor, step: Step, kind: str) -> Tensor:
    """The rollout's log-prob [N] from its stored mean [N, *latent], without a gradient."""
    with torch.no_grad():
        prev_sample, old_mean = _upcast(prev_sample), _upcast(old_mean)
        if kind == "cps":
            return _latent_mean(-((prev_sample - old_mean) ** 2))
        return _gaussian_log_prob(prev_sample, old_mean, _std(step, kind))


def flow_grpo_loss(
    log_prob: Tensor,  # [B]
    old_log_prob: Tensor,  # [B]
    advantages: Tensor,  # [B]
    clip: float,
    adv_clip: float,
) -> Tensor:
    """flow_grpo's and verl-omni's clipped surrogate of one step, []; DanceGRPO's is the same."""
    advantages = torch.clamp(advantages, -adv_clip, adv_clip)
    ratio = torch.exp(log_prob - old_log_prob)
    return torch.mean(_surrogate(ratio, advantages, clip))


def dance_grpo_loss(
    log_prob: Tensor,  # [B]
    old_log_prob: Tensor,  # [B]
    advantages: Tensor,  # [B]
    clip: float,
    adv_clip: float,
    accumulation: int,
) -> Tensor:
    """DanceGRPO's loss, []; ``accumulation`` is accumulation steps times trained timesteps."""
    return flow_grpo_loss(log_prob, old_log_prob, advantages, clip, adv_clip) / accumulation


def grpo_guard_loss(
    output: StepOutput,
    old_log_prob: Tensor,  # [B]
    old_mean: Tensor,  # [B, *latent]
    advantages: Tensor,  # [B]
    clip: float,
    adv_clip: float,
) -> Tensor:
    """verl-omni's GRPO-Guard of one step, []: ratio mean bias, sqrt(-dt) scaling, 1 / -dt."""
    advantages = torch.clamp(advantages, -adv_clip, adv_clip)
    sqrt_dt = output.sqrt_dt.mean()
    scale = sqrt_dt * output.std_dev_t.mean()
    bias = _latent_mean((output.prev_sample_mean - old_mean).pow(2)) / (2 * scale**2)
    ratio = torch.exp((output.log_prob - old_log_prob + bias) * scale)
    return torch.mean(_surrogate(ratio, advantages, clip)) / sqrt_dt**2


def flow_grpo_chain(
    model_output: Tensor,  # [K, B, *latent]
    *,
    sample: Tensor,  # [K, B, *latent]
    prev_sample: Tensor,  # [K, B, *latent]
    old_log_prob: Tensor,  # [K, B]
    advantages: Tensor,  # [B]
    step: Step,  # of the K * B transitions
    kind: str = "flow_sde",
    clip: float = 1e-4,
    adv_clip: float = 5.0,
) -> Tensor:
    """``GuardConfig.flow_grpo()`` as a chain, []: the raw ratio."""
    output = _sde_step(model_output, sample, prev_sample, step, kind)
    ratio = torch.exp(output.log_prob.view_as(old_log_prob) - old_log_prob)
    return _surrogate(ratio, torch.clamp(advantages, -adv_clip, adv_clip), clip).mean()


def article_chain(
    model_output: Tensor,  # [K, B, *latent]
    *,
    sample: Tensor,  # [K, B, *latent]
    prev_sample: Tensor,  # [K, B, *latent]
    old_log_prob: Tensor,  # [K, B]
    advantages: Tensor,  # [B]
    step: Step,  # of the K * B transitions
    kind: str = "flow_sde",
    clip: float = 0.2,
    adv_clip: float = 5.0,
    std_floor: float = 1e-8,
    weight_floor: float = 0.1,
) -> Tensor:
    """``GuardConfig.article()`` as a chain, []: standardized per step, weighted by 1 / ratio."""
    output = _sde_step(model_output, sample, prev_sample, step, kind)
    ratio = torch.exp(output.log_prob.view_as(old_log_prob) - old_log_prob)
    ratio = standardize(ratio, std_floor)
    with torch.no_grad():
        weights = 1 / ratio.clamp(min=weight_floor)
        weights = weights / weights.sum(0)
    losses = _surrogate(ratio, torch.clamp(advantages, -adv_clip, adv_clip), clip)
    return (weights * losses).sum(0).mean()


def paper_chain(
    model_output: Tensor,  # [K, B, *latent]
    *,
    sample: Tensor,  # [K, B, *latent]
    prev_sample: Tensor,  # [K, B, *latent]
    old_log_prob: Tensor,  # [K, B]
    old_mean: Tensor,  # [K, B, *latent]
    advantages: Tensor,  # [B]
    step: Step,  # of the K * B transitions
    kind: str = "flow_sde",
    clip: float = 2e-6,
    adv_clip: float = 5.0,
) -> Tensor:
    """``GuardConfig.paper()`` as a chain, []: verl-omni's GRPO-Guard, for each of K steps alone."""
    output = _sde_step(model_output, sample, prev_sample, step, kind)
    s, sqrt_dt = output.s.view_as(old_log_prob), output.sqrt_dt.view_as(old_log_prob)
    bias = _latent_mean((output.prev_sample_mean - old_mean.flatten(0, 1)).pow(2))
    bias = bias.view_as(old_log_prob) / (2 * s**2)
    log_ratio = output.log_prob.view_as(old_log_prob) - old_log_prob
    ratio = torch.exp((log_ratio + bias) * s)
    losses = _surrogate(ratio, torch.clamp(advantages, -adv_clip, adv_clip), clip)
    return (losses / sqrt_dt**2).mean()


def standardize(ratio: Tensor, std_floor: float = 1e-8) -> Tensor:
    """RatioNorm as it is written in a chain: ``1 + (r - mean(r)) / std(r)`` per row of [K, B]."""
    with torch.no_grad():
        mean = ratio.mean(-1, keepdim=True)
        std = ratio.std(-1, keepdim=True, correction=0)
        std = torch.where(std > std_floor, std, 1.0)
    return 1 + (ratio - mean) / std


def _sde_step(
    model_output: Tensor, sample: Tensor, prev_sample: Tensor, step: Step, kind: str
) -> StepOutput:
    v, x, y = (t.flatten(0, 1) for t in (model_output, sample, prev_sample))
    return SDE_STEPS[kind](v, x, y, step)


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _std(step: Step, kind: str) -> Tensor:
    """The density's standard deviation [N, 1, ...] of a Gaussian kind."""
    sqrt_dt = torch.sqrt(step.sigma - step.sigma_next)
    if kind == "dance_sde":
        return step.noise_level * sqrt_dt
    sigma = step.sigma
    std = torch.sqrt(sigma / (1 - torch.where(sigma == 1, step.sigma_max, sigma)))
    return std * step.noise_level * sqrt_dt


def _gaussian_log_prob(prev_sample: Tensor, mean: Tensor, s: Tensor) -> Tensor:
    """The log-density averaged over the latent, [N]; the constants are subtracted per element."""
    log_prob = (
        -((prev_sample.detach() - mean) ** 2) / (2 * s**2)
        - torch.log(s)
        - torch.log(torch.sqrt(2 * torch.as_tensor(math.pi)))
    )
    return _latent_mean(log_prob)


def _latent_mean(x: Tensor) -> Tensor:
    return x.mean(dim=tuple(range(1, x.ndim)))


def _surrogate(ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    clipped = torch.clamp(ratio, 1.0 - clip, 1.0 + clip)
    return torch.maximum(-advantages * ratio, -advantages * clipped)
