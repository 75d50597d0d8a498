"""GRPO-Guard as the frameworks compute it: numbers per sample in, loss and ratios out.

``docs/math.md`` derives the paper's RatioNorm with one scale ``s`` per transition. The public
trainers write the same thing with a scale averaged over the batch and a bias made from stored
means, and differ from one another in details; the switches here are those details.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .. import objective, ops
from ..blocks import clipped_surrogate
from ..checks import check_choice
from ..config import GuardConfig
from ..schedule import StepCoefficients

LOG_SQRT_2PI = objective.LOG_SQRT_2PI
BiasReduction = Literal["sample", "batch"]


class Difference(NamedTuple):
    """How the policy moved since the rollout, per sample, differentiable, [B] float64."""

    log_ratio: Tensor
    mean_square: Tensor  # mean over the latent of (mean - old mean)^2
    from_reference: Tensor | None = None  # the same of (mean - reference's mean)


class Surrogate(NamedTuple):
    """The loss of one step and the ratio it was made of."""

    loss: Tensor  # []
    excess: Tensor  # [B] ratio - 1
    losses: Tensor  # [B]


def difference(
    prev_sample_mean: Tensor,  # [B, *latent]
    old_prev_sample_mean: Tensor,  # [B, *latent]
    log_prob: Tensor,  # [B]
    old_log_prob: Tensor,  # [B]
) -> Difference:
    """How the policy has moved, according to a trainer's means and log-probs.

    The means are read in one pass. The log-ratio is the difference of the log-probs, as in the
    originals, and so has their rounding; a tail that is given the latents has not.
    """
    square = mean_square(prev_sample_mean, old_prev_sample_mean)
    return Difference(log_prob.double() - old_log_prob.double(), square)


def mean_square(mean: Tensor, old_mean: Tensor) -> Tensor:
    """Mean over the latent of ``(mean - old_mean)^2``, [B] float64, differentiable in ``mean``.

    It is the log-prob form with the mean in the place of the velocity (``a = 0, b = 1``) and the
    old mean in that of the sample: ``kappa (mean - y)^2`` with ``kappa = 1``.
    """
    table = torch.zeros(5, 1, 1, dtype=torch.float64, device=mean.device)
    table[1:4] = 1.0
    table[4] = -1.0
    coeffs = StepCoefficients._of(table.expand(5, 1, len(mean)), False, ())
    old = old_mean.detach().unsqueeze(0)
    found = ops.log_prob(mean.unsqueeze(0), sample=old, prev_sample=old, coeffs=coeffs)
    return -found.squeeze(0).double()


def guard_surrogate(
    moved: Difference,
    advantages: Tensor,  # [B]
    scale: Tensor,  # [] or [B]
    *,
    clip_low: float,
    clip_high: float,
    adv_clip: float,
    bias_reduction: BiasReduction = "sample",
    sample_weights: Tensor | None = None,  # [B], no gradient
) -> Surrogate:
    """``ratio = exp(scale (log r + bias))``, ``bias = mean((mean - old)^2) / (2 scale^2)``.

    Args:
        bias_reduction: "sample": every sample's own bias. "batch": one bias, the mean over the
            batch (flow_grpo's published script, its issue 244).
    """
    check_bias_reduction(bias_reduction)
    scale = scale.double()
    square = moved.mean_square.mean() if bias_reduction == "batch" else moved.mean_square
    excess = torch.expm1((moved.log_ratio + square / (2 * scale**2)) * scale)
    return _surrogate(excess, advantages, clip_low, clip_high, adv_clip, sample_weights)


def check_bias_reduction(bias_reduction: str) -> None:
    """Raises unless it is a way to take GRPO-Guard's bias over a batch."""
    check_choice("bias_reduction", bias_reduction, get_args(BiasReduction))


def averaged_surrogate(
    moved: Difference,
    advantages: Tensor,  # [B]
    std_dev_t: Tensor,  # [] or [B, 1, ...]
    sqrt_dt: Tensor,  # [], [B] or [B, 1, ...]
    *,
    clip: float,
    adv_clip: float,
    bias_reduction: BiasReduction = "sample",
    sample_weights: Tensor | None = None,
) -> Surrogate:
    """The loss of flow_grpo and verl-omni, with one scale for the whole batch.

    The scale is ``mean(sqrt_dt) mean(std_dev_t)``, and the loss is divided by ``mean(sqrt_dt)^2``.
    """
    root = sqrt_dt.double().mean()
    found = guard_surrogate(
        moved,
        advantages,
        root * std_dev_t.double().mean(),
        clip_low=clip,
        clip_high=clip,
        adv_clip=adv_clip,
        bias_reduction=bias_reduction,
        sample_weights=sample_weights,
    )
    return found._replace(loss=(found.loss / root**2).float())


def plain_surrogate(
    log_ratio: Tensor,  # [B]
    advantages: Tensor,  # [B]
    *,
    clip_low: float,
    clip_high: float,
    adv_clip: float,
    sample_weights: Tensor | None = None,
) -> Surrogate:
    """The loss of Flow-GRPO: ``ratio = r``, clipped."""
    excess = torch.expm1(log_ratio.double())
    return _surrogate(excess, advantages, clip_low, clip_high, adv_clip, sample_weights)


def _surrogate(
    excess: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    adv_clip: float,
    sample_weights: Tensor | None,
) -> Surrogate:
    config = GuardConfig.flow_grpo(clip_low=clip_low, clip_high=clip_high, adv_clip=adv_clip)
    losses = clipped_surrogate(excess, advantages.detach(), config=config)
    if sample_weights is not None:
        losses = losses * sample_weights.detach()
    return Surrogate(losses.mean().float(), excess.detach(), losses.detach())


def kl_to_reference(
    prev_sample_mean: Tensor,  # [B, *latent]
    ref_prev_sample_mean: Tensor,  # [B, *latent]
    std_dev_t: Tensor,  # [B, 1, ...]
    eps: float = 0.0,
) -> Tensor:
    """flow_grpo's KL [], ``mean((mean - ref)^2) / (2 std_dev_t^2 + eps)``, without dt."""
    square = (prev_sample_mean - ref_prev_sample_mean).square()
    return (square.flatten(1).mean(1) / (2 * std_dev_t.flatten() ** 2 + eps)).mean()
