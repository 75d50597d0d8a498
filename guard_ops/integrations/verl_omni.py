"""verl-omni (github.com/verl-project/verl-omni): its SDE scheduler's step and two fused losses.

``register()`` adds ``grpo_guard_fused`` and ``flow_grpo_fused`` to verl-omni's loss registry, to be
asked for as ``actor.diffusion_loss.loss_mode``. :func:`guard_ops.integrations.apply` also puts the
fused step under ``FlowMatchSDEDiscreteScheduler``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..schedule import SDE_RULES, SdeKind
from . import guard, steps
from .flow_grpo import draw_noise, std_and_sqrt_dt

KINDS: dict[str, SdeKind] = {"sde": "flow_sde", "cps": "cps", "dance_sde": "dance_sde"}


def sample_previous_step(
    self: Any,
    sample: Tensor,
    model_output: Tensor,
    timestep: Tensor | None = None,
    generator: Any = None,
    per_token_timesteps: Tensor | None = None,
    noise_level: float | Tensor = 0.7,
    prev_sample: Tensor | None = None,
    sde_type: str = "sde",
    return_logprobs: bool = True,
    return_sqrt_dt: bool = False,
    include_logprob_normalizer: bool = True,
) -> tuple[Tensor | None, ...]:
    """``FlowMatchSDEDiscreteScheduler.sample_previous_step`` on fused ops.

    Args:
        sample, model_output, prev_sample: [B, *latent]; ``sample`` is float32, as in the original.
        timestep: [B], or None for the scheduler's own ``step_index``.
        sde_type: "sde", "cps" or "dance_sde" (whose ``std_dev_t`` contains sqrt(-dt)).
        include_logprob_normalizer: False leaves ``log s + log sqrt(2 pi)`` out.

    Returns:
        prev_sample, log_prob [B] or None, prev_sample_mean, std_dev_t ([B, 1, ...], [] without
        ``timestep``), and, if asked for, sqrt(-dt) [B].

    Raises:
        ValueError: ``sde_type`` is none of these, or (on the CPU) a timestep is not in the
            schedule.
        NotImplementedError: ``per_token_timesteps`` is given, which the original refuses too.
    """
    if sde_type not in KINDS:
        raise ValueError(f"`sde_type` is {sde_type!r}; it needs one of {', '.join(KINDS)}")
    if per_token_timesteps is not None:
        raise NotImplementedError("`per_token_timesteps` is not supported, as in the original")
    kind = KINDS[sde_type]
    index = (
        int(self.step_index)
        if timestep is None
        else steps.index_for_timestep(self.timesteps, timestep)
    )
    coeffs = steps.coefficients(self.sigmas, index, noise_level, kind, len(sample), sample.device)
    step = steps.sde_step(
        model_output,
        sample,
        coeffs,
        prev_sample,
        lambda: draw_noise(model_output, generator),
        with_log_prob=return_logprobs,
    )
    log_prob = step.log_prob
    if log_prob is not None and SDE_RULES[kind].gaussian and not include_logprob_normalizer:
        log_prob = log_prob + (coeffs.s.log() + guard.LOG_SQRT_2PI).float().squeeze(0)
    std, sqrt_dt = std_and_sqrt_dt(coeffs, kind, sample)
    if timestep is None:
        std = std.flatten()[0]
    out = (step.prev_sample, log_prob, step.mean, std)
    return (*out, sqrt_dt.flatten()) if return_sqrt_dt else out


class FlowGRPOFusedLoss:
    """``FlowGRPOLoss``: the same inputs, loss and metrics, in ``expm1`` space."""

    required_model_output_keys = ("log_probs",)
    required_data_keys = ("old_log_probs", "advantages")

    @classmethod
    def compute_loss(
        cls,
        *,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        config: Any,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss [] and metrics of [B] log-probs; ``config.diffusion_loss`` has the clips."""
        settings = config.diffusion_loss
        log_ratio = log_prob.double() - old_log_prob.double()
        found = guard.plain_surrogate(
            log_ratio,
            advantages,
            clip_low=settings.clip_ratio,
            clip_high=settings.clip_ratio,
            adv_clip=settings.adv_clip_max,
            sample_weights=rollout_is_weights,
        )
        return found.loss, _metrics(found.excess, log_ratio, settings.clip_ratio)

    def __call__(self, *, config: Any, model_output: dict[str, Any], data: Any) -> Any:
        """What verl-omni's trainer calls."""
        loss, metrics = self.compute_loss(
            old_log_prob=data["old_log_probs"],
            log_prob=model_output["log_probs"],
            advantages=data["advantages"],
            config=config,
            rollout_is_weights=data.get("rollout_is_weights", None),
        )
        return _result(loss, metrics)


class GRPOGuardFusedLoss:
    """``GRPOGuardLoss``: the same inputs, loss and metrics; one pass over the two means.

    It computes on the log-probs that it is given, as the original does, in float64.
    """

    required_model_output_keys = ("log_probs", "prev_sample_mean", "std_dev_t", "sqrt_dt")
    required_data_keys = ("old_log_probs", "advantages", "old_prev_sample_mean")

    @classmethod
    def compute_loss(
        cls,
        *,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        config: Any,
        old_prev_sample_mean: Tensor,
        prev_sample_mean: Tensor,
        std_dev_t: Tensor,
        sqrt_dt: Tensor,
        rollout_is_weights: Tensor | None = None,
        bias_reduction: guard.BiasReduction = "sample",
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss [] and metrics; the scale is averaged over the batch, as in the original."""
        settings = config.diffusion_loss
        moved = guard.difference(prev_sample_mean, old_prev_sample_mean, log_prob, old_log_prob)
        found = guard.averaged_surrogate(
            moved,
            advantages,
            std_dev_t,
            sqrt_dt,
            clip=settings.clip_ratio,
            adv_clip=settings.adv_clip_max,
            bias_reduction=bias_reduction,
            sample_weights=rollout_is_weights,
        )
        return found.loss, _metrics(found.excess, moved.log_ratio, settings.clip_ratio)

    def __call__(self, *, config: Any, model_output: dict[str, Any], data: Any) -> Any:
        """What verl-omni's trainer calls."""
        loss, metrics = self.compute_loss(
            old_log_prob=data["old_log_probs"],
            log_prob=model_output["log_probs"],
            advantages=data["advantages"],
            old_prev_sample_mean=data["old_prev_sample_mean"],
            prev_sample_mean=model_output["prev_sample_mean"],
            std_dev_t=model_output["std_dev_t"],
            sqrt_dt=model_output["sqrt_dt"],
            config=config,
            rollout_is_weights=data.get("rollout_is_weights", None),
        )
        return _result(loss, metrics)


LOSSES = {"flow_grpo_fused": FlowGRPOFusedLoss, "grpo_guard_fused": GRPOGuardFusedLoss}


def register() -> tuple[str, ...]:
    """Put the losses into verl-omni's registry; returns their names. Repeating it is harmless."""
    from verl_omni.trainer.diffusion import diffusion_algos

    for name, loss in LOSSES.items():
        if name not in diffusion_algos.DIFFUSION_LOSS_REGISTRY:
            bases = (loss, diffusion_algos.DiffusionLossFn)
            diffusion_algos.register_diffusion_loss(name)(type(loss.__name__, bases, {}))
    return tuple(LOSSES)


def unregister() -> None:
    """Take the losses out of verl-omni's registry again."""
    from verl_omni.trainer.diffusion import diffusion_algos

    for name in LOSSES:
        diffusion_algos.DIFFUSION_LOSS_REGISTRY.pop(name, None)


def _result(loss: Tensor, metrics: dict[str, float]) -> Any:
    from verl_omni.trainer.diffusion.diffusion_algos import DiffusionLossResult

    return DiffusionLossResult(loss=loss, metrics=metrics)


def _metrics(excess: Tensor, log_ratio: Tensor, clip: float) -> dict[str, float]:
    """verl-omni's metrics as the numbers that its logger wants, in one read of the device."""
    high, low = excess > clip, excess < -clip
    values = {
        "actor/ppo_kl": -log_ratio.detach().mean(),
        "actor/pg_clipfrac": (high | low).double().mean(),
        "actor/pg_clipfrac_higher": high.double().mean(),
        "actor/pg_clipfrac_lower": low.double().mean(),
        "actor/ratio_mean": 1 + excess.mean(),
        "actor/ratio_std": excess.std(),
    }
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))
