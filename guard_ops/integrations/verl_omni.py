"""verl-omni (github.com/verl-project/verl-omni): its SDE scheduler's step and two fused losses.

``register()`` adds ``grpo_guard_fused`` and ``flow_grpo_fused`` to verl-omni's loss registry, to be
asked for as ``actor.diffusion_loss.loss_mode``. :func:`guard_ops.integrations.apply` also puts the
fused step under ``FlowMatchSDEDiscreteScheduler``.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..schedule import SDE_RULES, SdeKind
from . import guard, steps, tail
from .flow_grpo import averaged, draw_noise, std_and_sqrt_dt

KINDS: dict[str, SdeKind] = {"sde": "flow_sde", "cps": "cps", "dance_sde": "dance_sde"}
GUARDED = {  # the loss modes of training_loss, and which of them are GRPO-Guard's
    "flow_grpo": False,
    "flow_grpo_fused": False,
    "dance_grpo": False,
    "grpo_guard": True,
    "grpo_guard_fused": True,
}


def _kind(sde_type: str) -> SdeKind:
    if sde_type not in KINDS:
        raise ValueError(f"`sde_type` is {sde_type!r}; it needs one of {', '.join(KINDS)}")
    return KINDS[sde_type]


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
    kind = _kind(sde_type)
    if per_token_timesteps is not None:
        raise NotImplementedError("`per_token_timesteps` is not supported, as in the original")
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
        return found.loss, _read_metrics(found.excess, log_ratio, settings.clip_ratio)

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
        return found.loss, _read_metrics(found.excess, moved.log_ratio, settings.clip_ratio)

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


def training_loss(
    scheduler: Any,
    noise_pred: Tensor,
    micro_batch: Any,
    step: int,
    config: Any,
    model_config: Any,
) -> tuple[Tensor, dict[str, float]]:
    """All of ``forward_step`` between the velocity and the loss, as one call.

    ``config.diffusion_loss.loss_mode`` tells which objective. "grpo_guard" and "grpo_guard_fused"
    are GRPO-Guard, whose ratio comes from the stored mean in the mean form (exactly 1 on policy),
    in one pass where the samples are known to be at one timestep of "sde". "flow_grpo",
    "flow_grpo_fused" and "dance_grpo" are one objective, over the stored log-prob, in one pass.

    Args:
        scheduler: the engine's. noise_pred: velocity after guidance, [B, *latent], any floating
            dtype.
        micro_batch: the engine's: "all_latents" [B, T + 1, *latent], "all_timesteps",
            "advantages", "old_log_probs" (or "old_prev_sample_mean"), each [B, T, ...], and maybe
            "rollout_is_weights" [B]. step: the trained one.
        config: the actor's; ``diffusion_loss`` is read. model_config: ``algo.noise_level`` and
            ``algo.sde_type`` are read.

    Returns:
        The loss [] and verl-omni's metrics, numbers; reading them waits for the device, once.

    Raises:
        ValueError: ``loss_mode`` or ``sde_type`` is none of these, or (on the CPU) a timestep is
            not in the schedule.
    """
    settings, algo = config.diffusion_loss, model_config.algo
    if settings.loss_mode not in GUARDED:
        raise ValueError(
            f"`config.diffusion_loss.loss_mode` is {settings.loss_mode!r}; training_loss has "
            f"{', '.join(GUARDED)}"
        )
    kind = _kind(algo.sde_type)
    latents = micro_batch["all_latents"]
    x, y = latents[:, step], latents[:, step + 1]
    advantages = micro_batch["advantages"][:, step]
    index = steps.index_for_timestep(scheduler.timesteps, micro_batch["all_timesteps"][:, step])
    coeffs = steps.coefficients(
        scheduler.sigmas, index, algo.noise_level, kind, len(x), noise_pred.device
    )
    weights, clip = micro_batch.get("rollout_is_weights", None), settings.clip_ratio
    bounds = tail.Bounds(clip, clip, settings.adv_clip_max)
    if GUARDED[settings.loss_mode]:
        old_mean = micro_batch["old_prev_sample_mean"][:, step]
        t = tail.Transition(noise_pred, x, y, coeffs, old_mean=old_mean)
        one_step = steps.is_one_step(index, len(x))
        found = averaged(t, advantages, bounds, kind, "sample", weights, one_step=one_step)
    else:
        old_log_prob = micro_batch["old_log_probs"][:, step]
        t = tail.Transition(noise_pred, x, y, coeffs, old_log_prob=old_log_prob)
        found = tail.plain(t, advantages, bounds, weights)
    (log_ratio,), (excess,), *_ = found.per_row.tolist()
    return found.loss, _metrics(log_ratio, excess, clip)


LOSSES = {"flow_grpo_fused": FlowGRPOFusedLoss, "grpo_guard_fused": GRPOGuardFusedLoss}
_ORIGINALS = {"flow_grpo_fused": "flow_grpo", "grpo_guard_fused": "grpo_guard"}


def register() -> tuple[str, ...]:
    """Put the losses into verl-omni's registry, and their names among those its config takes.

    Every process that makes a loss or its config needs it. Repeating it is harmless.

    Returns:
        The names, for ``actor.diffusion_loss.loss_mode``.
    """
    from verl_omni.trainer.diffusion import diffusion_algos

    for name, loss in LOSSES.items():
        if name not in diffusion_algos.DIFFUSION_LOSS_REGISTRY:
            bases = (loss, diffusion_algos.DiffusionLossFn)
            diffusion_algos.register_diffusion_loss(name)(type(loss.__name__, bases, {}))
    config = _loss_config()
    if config is not None and not hasattr(config.__post_init__, "_guard_ops_original"):
        config.__post_init__ = _accepting(config.__post_init__)
    return tuple(LOSSES)


def unregister() -> None:
    """Take the losses and their names out again."""
    from verl_omni.trainer.diffusion import diffusion_algos

    for name in LOSSES:
        diffusion_algos.DIFFUSION_LOSS_REGISTRY.pop(name, None)
    config = _loss_config()
    original = getattr(getattr(config, "__post_init__", None), "_guard_ops_original", None)
    if original is not None:
        config.__post_init__ = original


def _loss_config() -> Any:
    """``DiffusionLossConfig``, which keeps its own list of names; None where there is none."""
    try:
        module = importlib.import_module("verl_omni.workers.config.diffusion.actor")
    except ModuleNotFoundError:
        return None
    return getattr(module, "DiffusionLossConfig", None)


def _accepting(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """``__post_init__`` that checks a fused loss's settings as those of the one it replaces.

    The list of names is a local of the original, so a name that is in it takes the fused one's
    place for as long as the check runs. (The config refuses assignments; ``object`` does not.)
    """

    @functools.wraps(original)
    def check(self: Any) -> None:
        asked = self.loss_mode
        if asked not in _ORIGINALS:
            original(self)
            return
        object.__setattr__(self, "loss_mode", _ORIGINALS[asked])
        try:
            original(self)
        finally:
            object.__setattr__(self, "loss_mode", asked)

    check._guard_ops_original = original  # type: ignore[attr-defined]
    return check


def _result(loss: Tensor, metrics: dict[str, float]) -> Any:
    from verl_omni.trainer.diffusion.diffusion_algos import DiffusionLossResult

    return DiffusionLossResult(loss=loss, metrics=metrics)


def _read_metrics(excess: Tensor, log_ratio: Tensor, clip: float) -> dict[str, float]:
    """:func:`_metrics` of [B] tensors, in one read of the device."""
    logs, moved = torch.stack([log_ratio.detach().double(), excess.double()]).tolist()
    return _metrics(logs, moved, clip)


def _metrics(logs: list[float], moved: list[float], clip: float) -> dict[str, float]:
    """verl-omni's metrics as the numbers that its logger wants, from log r and r - 1."""
    count = len(moved)
    bias = sum(moved) / count
    squares = sum([(u - bias) * (u - bias) for u in moved])  # which overflow to inf, as ** does not
    high, low = sum([u > clip for u in moved]) / count, sum([u < -clip for u in moved]) / count
    return {
        "actor/ppo_kl": -sum(logs) / count,
        "actor/pg_clipfrac": high + low,
        "actor/pg_clipfrac_higher": high,
        "actor/pg_clipfrac_lower": low,
        "actor/ratio_mean": 1 + bias,
        "actor/ratio_std": math.sqrt(squares / max(count - 1, 1)),  # torch's is NaN for one sample
    }
