"""flow_grpo (github.com/yifan123/flow_grpo): its SDE step, and its training scripts' tails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..schedule import SdeKind, StepCoefficients
from . import guard, steps, tail
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
    kind = _kind(sde_type)
    wanted = torch.as_tensor(timestep)
    index = steps.index_for_timestep(self.timesteps, wanted)
    coeffs = steps.coefficients(self.sigmas, index, noise_level, kind, len(sample), sample.device)
    step = steps.sde_step(
        model_output,
        sample.float(),
        coeffs,
        None if prev_sample is None else prev_sample.float(),
        lambda: draw_noise(model_output, generator),
    )
    std, sqrt_dt = std_and_sqrt_dt(coeffs, kind, sample)
    assert step.log_prob is not None
    out = (step.prev_sample, step.log_prob, step.mean, std)
    return (*out, sqrt_dt) if return_sqrt_dt else out


def _kind(sde_type: str | None) -> SdeKind:
    if sde_type not in KINDS:
        raise ValueError(f"`sde_type` is {sde_type!r}; it needs one of {', '.join(KINDS)}")
    return KINDS[sde_type]


def std_and_sqrt_dt(
    coeffs: StepCoefficients, kind: SdeKind, sample: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`std_and_sqrt_dt_of` as steps return them: float32 [B, 1, ...]."""
    std, sqrt_dt = std_and_sqrt_dt_of(coeffs, kind)
    return steps.per_sample(std, sample), steps.per_sample(sqrt_dt, sample)


def std_and_sqrt_dt_of(coeffs: StepCoefficients, kind: SdeKind) -> tuple[Tensor, Tensor]:
    """``std_dev_t`` as the public implementations have it, and sqrt(-dt), float64 [1, B].

    The one of Flow-SDE leaves sqrt(-dt) out; the others are the density's standard deviation.
    """
    sqrt_dt = (-coeffs.dt).sqrt()
    return (coeffs.s / sqrt_dt if kind == "flow_sde" else coeffs.s), sqrt_dt


def draw_noise(like: Tensor, generator: Any) -> Tensor:
    """Noise drawn as the originals draw it: float32, the same numbers from the same generators."""
    from diffusers.utils.torch_utils import randn_tensor

    noise: Tensor = randn_tensor(
        like.shape, generator=generator, device=like.device, dtype=torch.float32
    )
    return noise


class PolicyLoss(NamedTuple):
    """The tail of a training script: the loss, and what the script logs.

    ``info`` has tensors [], float32 and without a gradient; nothing waits for the device.
    """

    loss: Tensor  # []
    info: dict[str, Tensor]


def training_loss(
    scheduler: Any,
    noise_pred: Tensor,
    sample: Mapping[str, Tensor],
    j: int,
    config: Any,
    noise_pred_ref: Tensor | None = None,
    *,
    sde_type: str = "sde",
    bias_reduction: BiasReduction = "batch",
    gradient_accumulation_steps: int = 1,
) -> PolicyLoss:
    """All that ``scripts/train_*.py`` do between the velocity and ``accelerator.backward``.

    With ``config.rationorm`` it is the GRPO-Guard script's objective, whose ratio comes from the
    stored mean in the mean form (exactly 1 on policy), else Flow-GRPO's over the stored log-prob.

    Args:
        scheduler: ``pipeline.scheduler``. noise_pred: velocity after guidance, [B, *latent], any
            floating dtype. noise_pred_ref: the reference's, where ``config.train.beta`` > 0.
        sample: the script's: "timesteps", "latents", "next_latents", "log_probs" (or
            "prev_sample_mean"), "advantages", each [B, T, ...]. j: the trained timestep.
        config: its ``rationorm`` (False if absent), ``train.clip_range``, ``train.adv_clip_max``,
            ``train.beta`` and ``sample.noise_level`` are read.
        sde_type: "sde" or "cps" (``config.sample.sde_type`` in the scripts that have it).
        bias_reduction: "batch" is the script's, whose bias is one number for the whole batch (its
            issue 244); "sample" is what the paper says.
        gradient_accumulation_steps: of the Qwen-Image scripts, which divide both losses by it.

    Returns:
        PolicyLoss with the script's keys: approx_kl, clipfrac, clipfrac_gt_one, clipfrac_lt_one,
        policy_loss (the divided one), kl_loss where beta > 0, loss.

    Raises:
        ValueError: ``sde_type`` is neither, beta > 0 without ``noise_pred_ref``, or (on the CPU) a
            timestep is not in the schedule.
    """
    kind = _kind(sde_type)
    index = steps.index_for_timestep(scheduler.timesteps, sample["timesteps"][:, j])
    batch, level = len(noise_pred), config.sample.noise_level
    coeffs = steps.coefficients(scheduler.sigmas, index, level, kind, batch, noise_pred.device)
    rationorm = getattr(config, "rationorm", False)
    old = "old_mean" if rationorm else "old_log_prob"
    t, advantages, bounds = transition(noise_pred, sample, j, config, noise_pred_ref, coeffs, old)
    if rationorm:
        one_step = steps.is_one_step(index, batch)
        found = averaged(t, advantages, bounds, kind, bias_reduction, one_step=one_step)
    else:
        found = tail.plain(t, advantages, bounds)
    loss = found.loss
    if gradient_accumulation_steps != 1:
        loss = loss / gradient_accumulation_steps
    logged = loss.detach()
    above, below = found.above_and_below()
    info = {
        "approx_kl": approx_kl(found),
        "clipfrac": above + below,
        "clipfrac_gt_one": above,
        "clipfrac_lt_one": below,
        "policy_loss": logged,
    }
    if found.from_reference is not None:
        # the GRPO-Guard script's, and no other's, keeps from a division by zero
        share = _kl_share(coeffs, kind, 1e-7 if rationorm else 0.0, gradient_accumulation_steps)
        kl_loss = found.from_reference.dot(share).float()
        loss = loss + config.train.beta * kl_loss
        info["kl_loss"], logged = kl_loss.detach(), loss.detach()
    info["loss"] = logged
    return PolicyLoss(loss, info)


@tail.kept
def _kl_share(coeffs: StepCoefficients, kind: SdeKind, eps: float, parts: int) -> Tensor:
    """What of each sample's ``mean((mean - ref)^2)`` is in the scripts' mean KL, [B]."""
    std, _ = std_and_sqrt_dt_of(coeffs, kind)
    return 1 / (2 * std[0] ** 2 + eps) / (std.shape[-1] * parts)


SAMPLES = {"old_mean": "prev_sample_mean", "old_log_prob": "log_probs"}  # the scripts' names


def transition(
    noise_pred: Tensor,
    sample: Mapping[str, Tensor],
    j: int,
    config: Any,
    noise_pred_ref: Tensor | None,
    coeffs: StepCoefficients,
    old: str,
) -> tuple[tail.Transition, Tensor, tail.Bounds]:
    """What a script trains at timestep ``j``, and its bounds.

    Args:
        old: how the old policy is known, "old_mean" or "old_log_prob".

    Returns:
        The transition, with the reference where ``config.train.beta`` > 0; its advantages [B]; and
        ``config.train``'s clips.

    Raises:
        ValueError: beta > 0 without ``noise_pred_ref``.
    """
    train = config.train
    if train.beta > 0 and noise_pred_ref is None:
        raise ValueError(
            f"`noise_pred_ref` is missing; with `config.train.beta` {train.beta} it is needed"
        )
    t = tail.Transition(
        noise_pred,
        sample["latents"][:, j],
        sample["next_latents"][:, j],
        coeffs,
        ref_model_output=noise_pred_ref if train.beta > 0 else None,
        **{old: sample[SAMPLES[old]][:, j]},
    )
    bounds = tail.Bounds(train.clip_range, train.clip_range, train.adv_clip_max)
    return t, sample["advantages"][:, j], bounds


def approx_kl(found: tail.Clipped) -> Tensor:
    """``mean (log r)^2 / 2`` as the scripts log it, []."""
    log_ratio = found.log_ratio()
    square = log_ratio.dot(log_ratio)
    return (square * tail.number(0.5 / len(log_ratio), square)).float()


def averaged(
    t: tail.Transition,
    advantages: Tensor,
    bounds: tail.Bounds,
    kind: SdeKind,
    bias_reduction: BiasReduction,
    weights: Tensor | None = None,
    *,
    one_step: bool,
) -> tail.Clipped:
    """:func:`guard.averaged_surrogate` from the latents: its ratio is formed from differences.

    One pass where ``one_step`` (all samples are at one timestep), the scale is the density's ``s``
    (Flow-SDE) and no sample's bias depends on another; otherwise two.
    """
    guard.check_bias_reduction(bias_reduction)
    coeffs, of_batch = t.coeffs, bias_reduction == "batch"
    if one_step and kind == "flow_sde" and (not of_batch or len(advantages) == 1):
        by_dt = _by_own_dt(coeffs)
        by_dt = by_dt if weights is None else by_dt * weights
        return tail.closed_form(t, advantages, bounds, by_dt)
    exponent, share = _averaged_scale(coeffs, kind, tail.numel(t), of_batch)
    if weights is not None:
        share = share * tail.checked_weights(t, weights)
    return tail.of_sums(t, advantages, bounds, exponent, share)


@tail.kept
def _averaged_scale(
    coeffs: StepCoefficients, kind: SdeKind, numel: int, of_batch: bool
) -> tuple[tail.Exponent, Tensor]:
    """The exponent ``scale (log r + bias)``, and ``-1 / mean(sqrt_dt)^2 / B``."""
    std, sqrt_dt = std_and_sqrt_dt_of(coeffs, kind)
    root = sqrt_dt.mean()
    scale = root * std.mean()
    log_ratio = tail.log_ratio_rates(coeffs, numel)
    square = 1 / (2 * scale * numel)
    exponent = tail.scaled(log_ratio, scale, square, of_batch=of_batch)
    return exponent, -1 / (root**2 * std.shape[-1])


@tail.kept
def _by_own_dt(coeffs: StepCoefficients) -> Tensor:
    """``1 / -dt``, [B]: what that average is of samples at one timestep."""
    return -1 / coeffs.dt[0]


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
        "policy_loss": found.loss.detach(),
        "ratio_bias": excess.mean(),
        "ratio_std": excess.std(correction=0),
    }
