"""DanceGRPO (github.com/XueZeyue/DanceGRPO): ``flux_step`` and the tail of ``train_one_step``."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import loss, ops
from ..config import GuardConfig
from ..schedule import StepCoefficients
from . import guard, steps, tail


def flux_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    grpo: bool,
    sde_solver: bool,
) -> tuple[Tensor, ...]:
    """``flux_step`` of ``fastvideo/train_grpo_*.py`` (FLUX, HunyuanVideo, Qwen-Image, SD) fused.

    Args:
        model_output: velocity, [B, *latent]. latents: x, [B, *latent].
        sigmas: [N + 1]. index: the step; a tensor is looked up on its device.
        prev_sample: y of the update, or None to draw it.
        grpo: whether to return the log-prob. sde_solver: whether the mean is the SDE's or the
            ODE's; the noise is the SDE's either way.

    Returns:
        ``(prev_sample, pred_original_sample, log_prob [B])``, or without ``grpo``
        ``(prev_sample_mean, pred_original_sample)``; float32.
    """
    at = _from_the_front(index, len(sigmas))
    where = latents.device
    # [1], as the host would wait for the value of an index of no dimensions
    chosen = steps.on_device(at, where).reshape(1) if isinstance(at, Tensor) else at
    sigma = steps.on_device(sigmas, where)[chosen]
    x, v = latents.float(), model_output
    pred_original_sample = torch.addcmul(x, -sigma, v.float())
    coeffs = _coefficients(sigmas, at, eta, sde_solver, x)
    if not grpo:
        a, b = steps.per_sample(coeffs.a, x), steps.per_sample(coeffs.b, x)
        return torch.addcmul(a * x, b, v.float()), pred_original_sample
    step = steps.sde_step(
        v,
        x,
        coeffs,
        None if prev_sample is None else prev_sample.float(),
        lambda: torch.randn_like(x),
    )
    assert step.log_prob is not None
    return step.prev_sample, pred_original_sample, step.log_prob


def _coefficients(
    sigmas: Tensor, index: int | Tensor, eta: float, sde_solver: bool, x: Tensor
) -> StepCoefficients:
    """The step's coefficients for each sample, [1, B]."""
    index = _from_the_front(index, len(sigmas))
    if isinstance(index, Tensor):
        index = index.reshape(1)
    coeffs = steps.coefficients(sigmas, index, eta, "dance_sde", len(x), x.device)
    if sde_solver:
        return coeffs
    # the ODE's mean x + dt v, with the SDE's noise
    ones = torch.ones_like(coeffs.a)
    table = torch.stack([ones, coeffs.dt, coeffs.s, coeffs.kappa, coeffs.dt])
    return StepCoefficients._of(table, True, coeffs.deterministic)


def _from_the_front(index: int | Tensor, count: int) -> int | Tensor:
    """A step's index >= 0; a negative one counts from the end of the ``count`` sigmas.

    So -2 is the last step, and -1, at which no step begins, is out of range.
    """
    if isinstance(index, Tensor):
        return torch.where(index < 0, index + count, index)
    found = int(index) + (count if index < 0 else 0)
    if not 0 <= found < count - 1:
        raise ValueError(f"`index` is {index}; with {count} sigmas it needs 0 to {count - 2}")
    return found


def grpo_one_step_log_prob(
    pred: Tensor,
    latents: Tensor,
    pre_latents: Tensor,
    eta: float,
    sigma_schedule: Tensor,
    i: int | Tensor,
) -> Tensor:
    """The tail of ``grpo_one_step``, after the transformer: the log-prob [B], differentiable.

    It leaves out the predicted original sample, which :func:`flux_step` forms and ``grpo_one_step``
    throws away.

    Args:
        pred: velocity, [B, *latent]. latents: x. pre_latents: y. eta, sigma_schedule, i: the step.
    """
    return ops.log_prob(
        pred.unsqueeze(0),
        sample=latents.unsqueeze(0),
        prev_sample=pre_latents.unsqueeze(0),
        coeffs=_coefficients(sigma_schedule, i, eta, True, latents),
    ).squeeze(0)


class TrainingLoss(NamedTuple):
    """The loss of one timestep and the ratio that the scripts print."""

    loss: Tensor  # []
    ratio: Tensor  # [B]


def training_loss(
    args: Any,
    pred: Tensor,
    latents: Tensor,
    pre_latents: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    sigma_schedule: Tensor,
    i: int | Tensor,
    train_timesteps: int,
) -> TrainingLoss:
    """All that ``train_one_step`` does between the velocity and ``loss.backward``, in one pass.

    Args:
        args: the script's; its ``eta``, ``clip_range``, ``adv_clip_max`` and
            ``gradient_accumulation_steps`` are read.
        pred: velocity, [B, *latent]. latents: x. pre_latents: y. old_log_probs, advantages: [B].
        sigma_schedule, i: the step, as ``grpo_one_step`` has it.
        train_timesteps: how many timesteps share the loss.
    """
    # as a weight, because dividing the loss would take a pass over the gradient
    weight = 1 / (args.gradient_accumulation_steps * train_timesteps)
    found = tail.plain(
        tail.Transition(
            pred,
            latents,
            pre_latents,
            _coefficients(sigma_schedule, i, args.eta, True, latents),
            old_log_prob=old_log_probs,
        ),
        advantages,
        tail.Bounds(args.clip_range, args.clip_range, args.adv_clip_max),
        _equal_weights(weight, len(advantages), advantages.device),
    )
    excess = found.excess()
    return TrainingLoss(found.loss, excess + tail.number(1.0, excess))


def _equal_weights(weight: float, batch: int, device: torch.device) -> Tensor:
    """[B] float64; one on the CPU is kept."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return torch.full((batch,), weight, dtype=torch.float64, device=device)
    return _known_weights(weight, batch)


@functools.lru_cache(maxsize=64)
def _known_weights(weight: float, batch: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((batch,), weight, dtype=torch.float64, device="cpu")


def grpo_loss(
    new_log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_range: float,
    adv_clip_max: float,
    gradient_accumulation_steps: int,
    train_timesteps: int,
) -> Tensor:
    """The loss [] of one timestep in ``train_one_step``, after ``grpo_one_step``.

    Args:
        new_log_probs, old_log_probs, advantages: [B].
    """
    found = guard.plain_surrogate(
        new_log_probs.double() - old_log_probs.double(),
        advantages,
        clip_low=clip_range,
        clip_high=clip_range,
        adv_clip=adv_clip_max,
    )
    return found.loss / (gradient_accumulation_steps * train_timesteps)


def guard_loss(
    model_output: Tensor,
    latents: Tensor,
    prev_sample: Tensor,
    old_model_output: Tensor,
    advantages: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    config: GuardConfig,
) -> loss.GuardLossOutput:
    """:func:`guard_ops.guard_loss` of one timestep, for a rollout that kept its velocity.

    Args:
        model_output, latents, prev_sample, old_model_output: [B, *latent]. advantages: [B].
        eta, sigmas, index: as :func:`flux_step`.
        config: any whose ``balance`` needs one step only. ``inverse_ratio`` (the article's) is over
            all steps of a sample: docs/swap-in.md, "All steps at once".
    """
    coeffs = _coefficients(sigmas, index, eta, True, latents)
    return loss.guard_loss(
        model_output.unsqueeze(0),
        advantages=advantages,
        coeffs=coeffs,
        config=config,
        sample=latents.unsqueeze(0),
        prev_sample=prev_sample.unsqueeze(0),
        old_model_output=old_model_output.unsqueeze(0),
    )
