"""The block of each framework's training script from the velocity to the loss, three times.

``original`` is restated: the framework's step (:mod:`benchmarks.baselines`) and what its script
does with what that returns, whatever it logs included. ``tail`` is the framework's one-call tail.
``guard_loss`` is :func:`guard_ops.guard_loss` on the same tensors with the objective of guard_ops
that is nearest, which is what a tail may cost at best.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import guard_ops as go
from guard_ops.integrations import dance_grpo, flow_factory, flow_grpo, flow_grpo_wan, verl_omni

from . import baselines

CLIP, ADV_CLIP, LEVEL, STEPS, J = 1e-4, 5.0, 0.7, 10, 3
Loss = Callable[[Tensor], Tensor]  # of the velocity, []


class Batch(NamedTuple):
    """What a rollout of one framework left behind, for the trained timestep ``J``."""

    sigmas: Tensor  # [STEPS + 1]
    sample: dict[str, Tensor]  # flow_grpo's names; [B, T, ...]
    reference: Tensor  # the reference model's velocity, [B, *latent]
    kind: str
    scheduler: Any  # what the tails read of one


class Contender(NamedTuple):
    """One framework's block."""

    original: Callable[[Batch, Tensor], tuple[Tensor, dict[str, Any]]]
    tail: Callable[[Batch, Tensor], tuple[Tensor, dict[str, Any]]]
    kind: str = "flow_sde"
    guarded: bool = False  # GRPO-Guard's objective, over the stored mean
    # whether one number of the whole batch is in every ratio; then no gradient is known before all
    # latents are read, and the tail reads them a second time: 9 latents' bytes instead of 5
    coupled: bool = False


def make_batch(
    shape: tuple[int, ...], kind: str = "flow_sde", mixed: bool = False, seed: int = 0
) -> tuple[Batch, Tensor]:
    """A rollout's batch and a velocity that has moved since. shape: [B, *latent].

    mixed: the samples' timesteps differ.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn() -> Tensor:
        return torch.randn(shape, generator=generator)

    sigmas = torch.linspace(1, 0, STEPS + 1)
    sigmas = 3 * sigmas / (1 + 2 * sigmas)
    index = torch.full((shape[0],), J)
    if mixed:
        index = (torch.arange(shape[0]) + J) % (STEPS - 1)
    v_old, x, drift = randn(), randn(), randn()
    step = baselines.scheduler_step(sigmas, index, noise_level(kind), len(shape) - 1)
    of_mean = baselines.SDE_STEPS[kind](v_old, x, x, step)
    y = of_mean.prev_sample_mean + of_mean.s * randn()
    old = baselines.SDE_STEPS[kind](v_old, x, y, step)
    one: dict[str, Tensor] = {
        "timesteps": 1000 * sigmas[index],
        "timesteps_next": 1000 * sigmas[index + 1],
        "latents": x,
        "next_latents": y,
        "log_probs": old.log_prob,
        "prev_sample_mean": old.prev_sample_mean,
        "advantages": torch.randn(shape[0], generator=generator),
    }
    sample = {name: value.unsqueeze(1) for name, value in one.items()}
    sample["all_latents"] = torch.stack([x, y], 1)
    velocity = v_old + 0.02 * drift
    dynamics = {"flow_sde": "Flow-SDE", "dance_sde": "Dance-SDE", "cps": "CPS", "wan_sde": ""}
    scheduler = SimpleNamespace(
        sigmas=sigmas,
        timesteps=1000 * sigmas[:-1],
        dynamics_type=dynamics[kind],
        noise_level=LEVEL,
        is_eval=False,
    )
    return Batch(sigmas, sample, v_old - 0.05 * drift, kind, scheduler), velocity


def noise_level(kind: str) -> float:
    """Wan's step has none."""
    return 1.0 if kind == "wan_sde" else LEVEL


def _step(batch: Batch, v: Tensor) -> baselines.StepOutput:
    """The framework's step, its index looked up sample by sample as diffusers does."""
    timesteps = batch.scheduler.timesteps
    found = [(timesteps == t).nonzero() for t in batch.sample["timesteps"][:, 0]]
    index = torch.tensor([each[0].item() for each in found])
    step = baselines.scheduler_step(batch.sigmas, index, noise_level(batch.kind), v.ndim - 1)
    x, y = batch.sample["latents"][:, 0], batch.sample["next_latents"][:, 0]
    return baselines.SDE_STEPS[batch.kind](v.float(), x.float(), y.float(), step)


def _old(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    names = ("log_probs", "prev_sample_mean", "advantages")
    log_prob, mean, advantages = (batch.sample[name][:, 0] for name in names)
    return log_prob, mean, advantages


def _losses(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    unclipped = -advantages * ratio
    return unclipped, -advantages * torch.clamp(ratio, 1.0 - low, 1.0 + high)


# ---- flow_grpo ----------------------------------------------------------------------------------


def flow_grpo_config(rationorm: bool, beta: float = 0.0) -> Any:
    """The part of its config that the block reads."""
    train = SimpleNamespace(clip_range=CLIP, adv_clip_max=ADV_CLIP, beta=beta)
    return SimpleNamespace(
        rationorm=rationorm, train=train, sample=SimpleNamespace(noise_level=LEVEL)
    )


def flow_grpo_original(
    batch: Batch, v: Tensor, *, rationorm: bool, beta: float = 0.0
) -> tuple[Tensor, dict[str, Any]]:
    """The tail of ``scripts/train_sd3_GRPO_Guard.py``; its bias is one number for the batch."""
    old_log_prob, old_mean, advantages = _old(batch)
    out = _step(batch, v)
    log_prob, mean, std, sqrt_dt, _ = out
    advantages = torch.clamp(advantages, -ADV_CLIP, ADV_CLIP)
    if rationorm:
        sigma_t = std.mean()
        bias = (mean - old_mean).pow(2).mean(dim=tuple(range(1, log_prob.ndim)))
        bias = bias / (2 * (sqrt_dt.mean() * sigma_t) ** 2)
        ratio = torch.exp((log_prob - old_log_prob + bias) * (sqrt_dt.mean() * sigma_t))
    else:
        ratio = torch.exp(log_prob - old_log_prob)
    policy_loss = torch.mean(torch.maximum(*_losses(ratio, advantages, CLIP, CLIP)))
    if rationorm:
        policy_loss = policy_loss / (sqrt_dt.mean() ** 2)
    info = {
        "approx_kl": 0.5 * torch.mean((log_prob - old_log_prob) ** 2),
        "clipfrac": torch.mean((torch.abs(ratio - 1.0) > CLIP).float()),
        "clipfrac_gt_one": torch.mean((ratio - 1.0 > CLIP).float()),
        "clipfrac_lt_one": torch.mean((1.0 - ratio > CLIP).float()),
        "policy_loss": policy_loss,
    }
    loss = policy_loss
    if beta > 0:
        with torch.no_grad():
            ref_mean = _step(batch, batch.reference).prev_sample_mean
        square = (mean - ref_mean) ** 2
        kl = square.mean(dim=tuple(range(1, v.ndim)), keepdim=True)
        kl = kl / (2 * std**2 + (1e-7 if rationorm else 0))
        info["kl_loss"] = torch.mean(kl)
        loss = policy_loss + beta * info["kl_loss"]
    return loss, info | {"loss": loss}


def flow_grpo_tail(
    batch: Batch, v: Tensor, *, rationorm: bool, beta: float = 0.0
) -> tuple[Tensor, dict[str, Any]]:
    """:func:`guard_ops.integrations.flow_grpo.training_loss`."""
    return flow_grpo.training_loss(
        batch.scheduler,
        v,
        batch.sample,
        0,
        flow_grpo_config(rationorm, beta),
        batch.reference if beta > 0 else None,
        sde_type="cps" if batch.kind == "cps" else "sde",
    )


def wan_original(batch: Batch, v: Tensor, *, beta: float = 0.0) -> tuple[Tensor, dict[str, Any]]:
    """The tail of ``scripts/train_wan2_1.py``."""
    old_log_prob, _, advantages = _old(batch)
    out = _step(batch, v)
    advantages = torch.clamp(advantages, -ADV_CLIP, ADV_CLIP)
    ratio = torch.exp(out.log_prob - old_log_prob)
    policy_loss = torch.mean(torch.maximum(*_losses(ratio, advantages, CLIP, CLIP)))
    info = {
        "approx_kl": 0.5 * torch.mean((out.log_prob - old_log_prob) ** 2),
        "clipfrac": torch.mean((torch.abs(ratio - 1.0) > CLIP).float()),
        "policy_loss": policy_loss,
    }
    loss = policy_loss
    if beta > 0:
        with torch.no_grad():
            ref = _step(batch, batch.reference)
        square = (out.prev_sample_mean - ref.prev_sample_mean) ** 2
        kl = square.mean(dim=(1, 2, 3), keepdim=True) / (2 * (out.std_dev_t * ref.sqrt_dt) ** 2)
        info["kl_loss"] = torch.mean(kl)
        loss = policy_loss + beta * info["kl_loss"]
    return loss, info | {"loss": loss}


def wan_tail(batch: Batch, v: Tensor, *, beta: float = 0.0) -> tuple[Tensor, dict[str, Any]]:
    """:func:`guard_ops.integrations.flow_grpo_wan.training_loss`."""
    reference = batch.reference if beta > 0 else None
    config = flow_grpo_config(False, beta)
    return flow_grpo_wan.training_loss(batch.scheduler, v, batch.sample, 0, config, reference)


# ---- DanceGRPO ----------------------------------------------------------------------------------

DANCE_ARGS = SimpleNamespace(
    eta=LEVEL, clip_range=CLIP, adv_clip_max=ADV_CLIP, gradient_accumulation_steps=4
)


def dance_grpo_original(batch: Batch, v: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The tail of ``train_one_step``."""
    old_log_prob, _, advantages = _old(batch)
    log_prob = _step(batch, v).log_prob
    advantages = torch.clamp(advantages, -ADV_CLIP, ADV_CLIP)
    ratio = torch.exp(log_prob - old_log_prob)
    loss = torch.mean(torch.maximum(*_losses(ratio, advantages, CLIP, CLIP)))
    loss = loss / (DANCE_ARGS.gradient_accumulation_steps * STEPS)
    return loss, {"ratio": ratio}


def dance_grpo_tail(batch: Batch, v: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """:func:`guard_ops.integrations.dance_grpo.training_loss`."""
    names = ("latents", "next_latents", "log_probs", "advantages")
    x, y, old_log_prob, advantages = (batch.sample[name][:, 0] for name in names)
    found = dance_grpo.training_loss(
        DANCE_ARGS, v, x, y, old_log_prob, advantages, batch.sigmas, J, STEPS
    )
    return found.loss, {"ratio": found.ratio}


# ---- Flow-Factory -------------------------------------------------------------------------------

CLIP_RANGE, ADV_CLIP_RANGE = (-1e-4, 2e-4), (-3.0, 5.0)


def flow_factory_args(kl_beta: float = 0.0, kl_type: str = "v-based") -> Any:
    """The part of its training arguments that the block reads."""
    return SimpleNamespace(
        clip_range=CLIP_RANGE, adv_clip_range=ADV_CLIP_RANGE, kl_beta=kl_beta, kl_type=kl_type
    )


def flow_factory_original(
    batch: Batch, v: Tensor, *, guarded: bool, kl_beta: float = 0.0, kl_type: str = "v-based"
) -> tuple[Tensor, dict[str, Any]]:
    """``GRPOTrainer.optimize`` and ``GRPOGuardTrainer.optimize``."""
    old_log_prob, old_mean, advantages = _old(batch)
    out = _step(batch, v)
    std = out.std_dev_t / out.sqrt_dt if batch.kind == "dance_sde" else out.std_dev_t
    adv = torch.clamp(advantages, *ADV_CLIP_RANGE)
    if guarded:
        scale = (out.sqrt_dt * std).flatten()
        mse = (out.prev_sample_mean - old_mean).flatten(1).pow(2).mean(dim=1)
        ratio = torch.exp((out.log_prob - old_log_prob) * scale + mse / (2 * scale))
    else:
        ratio = torch.exp(out.log_prob - old_log_prob)
    unclipped, clipped = _losses(ratio, adv, -CLIP_RANGE[0], CLIP_RANGE[1])
    policy_loss = torch.mean(torch.maximum(unclipped, clipped))
    info = {"policy_loss": policy_loss.detach()}
    loss = policy_loss
    if kl_beta > 0:
        if kl_type == "v-based":
            square = (v.float() - batch.reference) ** 2
        else:
            with torch.no_grad():
                ref_mean = _step(batch, batch.reference).prev_sample_mean
            square = (out.prev_sample_mean - ref_mean) ** 2
        kl_div = torch.mean(square.flatten(1).mean(1))
        loss = policy_loss + kl_beta * kl_div
        info |= {"kl_div": kl_div.detach(), "kl_loss": kl_beta * kl_div.detach()}
    high = torch.mean((ratio > 1.0 + CLIP_RANGE[1]).float())
    low = torch.mean((ratio < 1.0 + CLIP_RANGE[0]).float())
    return loss, info | {
        "ratio": ratio.detach(),
        "unclipped_loss": unclipped.detach(),
        "clipped_loss": clipped.detach(),
        "loss": loss.detach(),
        "clip_frac_high": high,
        "clip_frac_low": low,
        "clip_frac_total": high + low,
    }


def flow_factory_tail(
    batch: Batch, v: Tensor, *, guarded: bool, kl_beta: float = 0.0, kl_type: str = "v-based"
) -> tuple[Tensor, dict[str, Any]]:
    """:func:`guard_ops.integrations.flow_factory.training_loss`."""
    old = "prev_sample_mean" if guarded else "log_probs"
    names = ("timesteps", "timesteps_next", "latents", "next_latents", "advantages", old)
    one = {name: batch.sample[name][:, 0] for name in names}
    return flow_factory.training_loss(
        batch.scheduler,
        v,
        one["timesteps"],
        one["timesteps_next"],
        one["latents"],
        one["next_latents"],
        one["advantages"],
        flow_factory_args(kl_beta, kl_type),
        old_log_prob=None if guarded else one[old],
        old_next_latents_mean=one[old] if guarded else None,
        ref_noise_pred=batch.reference if kl_beta > 0 else None,
    )


# ---- verl-omni ----------------------------------------------------------------------------------


def verl_config(mode: str) -> Any:
    """The part of its actor's config that the losses read."""
    return SimpleNamespace(
        diffusion_loss=SimpleNamespace(loss_mode=mode, clip_ratio=CLIP, adv_clip_max=ADV_CLIP)
    )


def verl_original(batch: Batch, v: Tensor, *, guarded: bool) -> tuple[Tensor, dict[str, Any]]:
    """``forward_step`` from the velocity on: the step, ``GRPOGuardLoss`` or ``FlowGRPOLoss``."""
    old_log_prob, old_mean, advantages = _old(batch)
    out = _step(batch, v)
    advantages = torch.clamp(advantages, -ADV_CLIP, ADV_CLIP)
    log_ratio = out.log_prob - old_log_prob
    sqrt_dt = out.sqrt_dt.mean()
    if guarded:
        scale = sqrt_dt * out.std_dev_t.mean()
        square = (out.prev_sample_mean - old_mean).pow(2)
        bias = square.mean(dim=tuple(range(1, square.ndim))) / (2 * scale**2)
        ratio = torch.exp((log_ratio + bias) * scale)
    else:
        ratio = torch.exp(log_ratio)
    loss = torch.mean(torch.maximum(*_losses(ratio, advantages, CLIP, CLIP)))
    if guarded:
        loss = loss / sqrt_dt**2
    with torch.no_grad():
        metrics = {
            "actor/ppo_kl": torch.mean(-log_ratio).item(),
            "actor/pg_clipfrac": torch.mean((torch.abs(ratio - 1.0) > CLIP).float()).item(),
            "actor/pg_clipfrac_higher": torch.mean((ratio - 1.0 > CLIP).float()).item(),
            "actor/pg_clipfrac_lower": torch.mean((1.0 - ratio > CLIP).float()).item(),
            "actor/ratio_mean": ratio.mean().item(),
            "actor/ratio_std": ratio.std().item(),
        }
    return loss, metrics


def verl_tail(batch: Batch, v: Tensor, *, guarded: bool) -> tuple[Tensor, dict[str, Any]]:
    """:func:`guard_ops.integrations.verl_omni.training_loss`."""
    sample = batch.sample
    micro_batch = {
        "all_latents": sample["all_latents"],
        "all_timesteps": sample["timesteps"],
        "advantages": sample["advantages"],
        "old_log_probs": sample["log_probs"],
        "old_prev_sample_mean": sample["prev_sample_mean"],
    }
    sde_type = {"flow_sde": "sde"}.get(batch.kind, batch.kind)
    model_config = SimpleNamespace(algo=SimpleNamespace(noise_level=LEVEL, sde_type=sde_type))
    mode = "grpo_guard" if guarded else "flow_grpo"
    return verl_omni.training_loss(
        batch.scheduler, v, micro_batch, 0, verl_config(mode), model_config
    )


def _given(function: Any, **options: Any) -> Any:
    return lambda batch, v: function(batch, v, **options)


CONTENDERS = {
    "flow_grpo": Contender(
        _given(flow_grpo_original, rationorm=False), _given(flow_grpo_tail, rationorm=False)
    ),
    "flow_grpo, GRPO-Guard": Contender(
        _given(flow_grpo_original, rationorm=True),
        _given(flow_grpo_tail, rationorm=True),
        guarded=True,
        coupled=True,
    ),
    "flow_grpo, Wan2.1": Contender(wan_original, wan_tail, "wan_sde"),
    "DanceGRPO": Contender(dance_grpo_original, dance_grpo_tail, "dance_sde"),
    "verl-omni": Contender(_given(verl_original, guarded=False), _given(verl_tail, guarded=False)),
    "verl-omni, GRPO-Guard": Contender(
        _given(verl_original, guarded=True), _given(verl_tail, guarded=True), guarded=True
    ),
    "Flow-Factory": Contender(
        _given(flow_factory_original, guarded=False), _given(flow_factory_tail, guarded=False)
    ),
    "Flow-Factory, GRPO-Guard": Contender(
        _given(flow_factory_original, guarded=True),
        _given(flow_factory_tail, guarded=True),
        guarded=True,
    ),
}


def guard_loss(batch: Batch, guarded: bool) -> Loss:
    """:func:`guard_ops.guard_loss` on what the block is given, of which it takes a timestep as a
    block does; the schedule is made once.
    """
    level = noise_level(batch.kind)
    coeffs = go.SdeSchedule(batch.sigmas, level, batch.kind)[J]  # type: ignore[arg-type]
    name, old = ("old_mean", "prev_sample_mean") if guarded else ("old_log_prob", "log_probs")
    make = go.GuardConfig.paper if guarded else go.GuardConfig.flow_grpo
    config = make(balance="none")
    sample = batch.sample

    def loss(v: Tensor) -> Tensor:
        return go.guard_loss(
            v,
            advantages=sample["advantages"][:, 0],
            coeffs=coeffs,
            config=config,
            sample=sample["latents"][:, 0],
            prev_sample=sample["next_latents"][:, 0],
            **{name: sample[old][:, 0]},  # type: ignore[arg-type]
        ).loss

    return loss
