"""Flow-Factory (github.com/X-GenGroup/Flow-Factory): its SDE step and its GRPO-Guard loss."""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..schedule import SDE_RULES, SdeKind, StepCoefficients
from . import guard, steps, tail
from .flow_grpo import draw_noise

KINDS: dict[str, SdeKind] = {"Flow-SDE": "flow_sde", "Dance-SDE": "dance_sde", "CPS": "cps"}
_RETURNS = ("next_latents", "next_latents_mean", "std_dev_t", "dt", "log_prob", "noise_pred")


def step(
    self: Any,
    noise_pred: Tensor,
    timestep: float | Tensor,
    latents: Tensor,
    next_latents: Tensor | None = None,
    timestep_next: float | Tensor | None = None,
    generator: Any = None,
    noise_level: float | Tensor | None = None,
    compute_log_prob: bool = True,
    return_dict: bool = True,
    return_kwargs: list[str] | tuple[str, ...] = _RETURNS,
    dynamics_type: str | None = None,
    sigma_max: float | None = None,
) -> Any:
    """``FlowMatchEulerDiscreteSDEScheduler.step`` on fused ops.

    Args:
        noise_pred: velocity, [B, *latent]. latents: x. next_latents: y of the update, or None.
        timestep, timestep_next: [] or [B], of ``self.timesteps``; an integer is a step's number.
            If ``timestep_next`` is given, they may be any two in [0, 1000], as nothing is looked
            up.
        noise_level: None takes the scheduler's for this step. dynamics_type: "Flow-SDE",
            "Dance-SDE", "CPS" or "ODE"; None takes the scheduler's.

    Returns:
        ``SDESchedulerOutput`` of ``return_kwargs``, or a tuple; float32. A fresh sample is rounded
        to the dtype of ``latents``, and its log-prob is that of the rounded one. An evaluation is
        the same with noise level 0: it draws and rounds, and a Gaussian's log-prob is not finite.

    Raises:
        ValueError: ``dynamics_type`` is none of these, ``timestep`` has more than one dimension,
            or (on the CPU) a timestep is not in the schedule.
    """
    dynamics = dynamics_type or self.dynamics_type
    if dynamics != "ODE" and dynamics not in KINDS:
        raise ValueError(
            f"`dynamics_type` is {dynamics!r}; it needs one of {', '.join(KINDS)}, ODE"
        )
    batch, device = len(latents), latents.device
    if self.is_eval or dynamics == "ODE":
        noise_level = 0.0
    sigma, following, level = _sigmas(self, timestep, timestep_next, noise_level, latents)
    dt = steps.per_sample((following - sigma).expand(batch), latents)
    if dynamics == "ODE":
        mean = torch.addcmul(latents.float(), dt, noise_pred.float())
        zero = torch.zeros_like(dt)
        chosen = mean if next_latents is None else next_latents.float()
        log_prob = torch.zeros(batch, device=device) if compute_log_prob else None
        return _output(
            self, (chosen, mean, noise_pred.float(), log_prob, zero, dt), return_dict, return_kwargs
        )
    kind = KINDS[dynamics]
    top = steps.top_where_one(sigma, float(sigma_max) if sigma_max else self.sigmas[1])
    coeffs = steps.coefficients_at(sigma, following, level, kind, top, batch)
    done = steps.sde_step(
        noise_pred,
        latents,
        coeffs,
        None if next_latents is None else next_latents.float(),
        lambda: draw_noise(noise_pred, generator),
        with_log_prob=compute_log_prob,
        store_dtype=latents.dtype,
    )
    root = (-coeffs.dt).sqrt()
    std = coeffs.s / root if SDE_RULES[kind].diffusion else coeffs.s
    std = steps.per_sample(std, latents)
    return _output(
        self,
        (done.prev_sample, done.mean, noise_pred.float(), done.log_prob, std, dt),
        return_dict,
        return_kwargs,
    )


def timestep_of(self: Any, timestep: float | Tensor) -> Tensor:
    """The scheduler's timesteps [1] or [B] that ``timestep`` names, itself or by its number."""
    at = torch.as_tensor(timestep).reshape(-1)
    found: Tensor = at if at.is_floating_point() else self.timesteps[at.to(self.timesteps.device)]
    return found


def _sigmas(
    self: Any,
    timestep: float | Tensor,
    timestep_next: float | Tensor | None,
    noise_level: float | Tensor | None,
    latents: Tensor,
) -> tuple[Tensor, Tensor, float | Tensor]:
    """sigma, the next one and the noise level, each [] or [B] (the level may be a number)."""
    device = latents.device
    now = steps.on_device(steps.number(timestep, device), device)
    index = None
    if timestep_next is None:
        if now.ndim > 1:
            raise ValueError(
                f"`timestep` has shape {tuple(now.shape)}; it needs [] or [B], the timestep before "
                "it is expanded"
            )
        if isinstance(timestep, int) or not now.is_floating_point():
            index = now.long().reshape(-1)  # the step's number, as the original takes it
        else:
            found = steps.index_for_timestep(steps.on_device(self.timesteps, device), now)
            index = torch.as_tensor(found, device=device)
        sigmas = steps.on_device(self.sigmas, device)
        sigma, following = sigmas[index], sigmas[index + 1]
    else:
        sigma = now / 1000
        following = steps.on_device(steps.number(timestep_next, device), device) / 1000
    if noise_level is None:
        if index is None:
            found = steps.index_for_timestep(steps.on_device(self.sigmas, device), sigma)
            index = torch.as_tensor(found, device=device)
        eligible = torch.isin(index, steps.on_device(self.current_sde_steps, device))
        noise_level = torch.where(eligible, float(self.noise_level), 0.0)
    if isinstance(noise_level, Tensor):
        noise_level = steps.on_device(noise_level, device).flatten()
    return sigma, following, noise_level


def _output(
    self: Any, values: tuple[Any, ...], return_dict: bool, return_kwargs: Any
) -> dict[str, Any] | tuple[Any, ...]:
    if not return_dict:
        return values
    order = ("next_latents", "next_latents_mean", "noise_pred", "log_prob", "std_dev_t", "dt")
    found = dict(zip(order, values, strict=True))
    module = importlib.import_module(type(self).__module__)
    result: Any = module.SDESchedulerOutput.from_dict(
        {name: found[name] for name in return_kwargs if name in found}
    )
    return result  # type: ignore[no-any-return]


class GuardLoss(NamedTuple):
    """The loss of ``GRPOGuardTrainer.optimize`` and what it logs of the ratio."""

    loss: Tensor  # []
    ratio: Tensor  # [B]
    clip_frac_high: Tensor  # []
    clip_frac_low: Tensor  # []


def grpo_guard_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    next_latents_mean: Tensor,
    old_next_latents_mean: Tensor,
    std_dev_t: Tensor,
    dt: Tensor,
    advantages: Tensor,
    *,
    clip_range: tuple[float, float],
    adv_clip_range: tuple[float, float],
) -> GuardLoss:
    """The policy loss of ``GRPOGuardTrainer``: each sample's own scale, no division by dt.

    Args:
        log_prob, old_log_prob, advantages: [B]. next_latents_mean: as the step returned it.
        old_next_latents_mean: the rollout's, [B, *latent]. std_dev_t, dt: [B, 1, ...].
        clip_range, adv_clip_range: (negative, positive), as in its configuration.
    """
    moved = guard.difference(next_latents_mean, old_next_latents_mean, log_prob, old_log_prob)
    scale = (-dt.double()).sqrt().flatten() * std_dev_t.double().flatten()
    low, high = clip_range
    found = guard.guard_surrogate(
        moved,
        advantages.clamp(*adv_clip_range),
        scale,
        clip_low=-low,
        clip_high=high,
        adv_clip=max(abs(bound) for bound in adv_clip_range),
    )
    excess = found.excess
    return GuardLoss(
        found.loss,
        (1 + excess).float(),
        (excess > high).double().mean(),
        (excess < low).double().mean(),
    )


class TrainingLoss(NamedTuple):
    """The loss of one timestep, and what the trainer appends to its ``loss_info`` for it."""

    loss: Tensor  # []
    loss_info: dict[str, Tensor]  # float32, without a gradient


def training_loss(
    scheduler: Any,
    noise_pred: Tensor,
    t: float | Tensor,
    t_next: float | Tensor,
    latents: Tensor,
    next_latents: Tensor,
    advantage: Tensor,
    training_args: Any,
    *,
    old_log_prob: Tensor | None = None,
    old_next_latents_mean: Tensor | None = None,
    ref_noise_pred: Tensor | None = None,
) -> TrainingLoss:
    """All that ``optimize`` does between the velocity and ``accelerator.backward``.

    With ``old_log_prob`` it is ``GRPOTrainer``'s objective, with ``old_next_latents_mean`` that of
    ``GRPOGuardTrainer``: each sample's own scale, no division by dt, and a ratio from differences.
    Without a KL either is one pass (GRPO-Guard over "CPS" is two).

    Args:
        scheduler: ``self.adapter.scheduler``; its ``dynamics_type`` and ``noise_level`` are read.
        noise_pred: ``output.noise_pred``, [B, *latent], any floating dtype. ref_noise_pred: the
            reference's, where ``training_args.kl_beta`` > 0.
        t, t_next: [] or [B], in [0, 1000]. latents: x. next_latents: y. advantage: [B].
        training_args: its ``clip_range`` and ``adv_clip_range`` (negative, positive), ``kl_beta``
            and ``kl_type`` ("v-based" or "x-based") are read.

    Returns:
        TrainingLoss with the trainer's keys: ratio, unclipped_loss, clipped_loss [B]; policy_loss,
        kl_div and kl_loss where kl_beta > 0, loss, clip_frac_high, clip_frac_low, clip_frac_total.

    Raises:
        ValueError: not exactly one of the two old ones is given, the scheduler is an ODE's, or
            kl_beta > 0 without ``ref_noise_pred``.
    """
    if (old_log_prob is None) == (old_next_latents_mean is None):
        raise ValueError("exactly one of `old_log_prob` and `old_next_latents_mean` is needed")
    if scheduler.dynamics_type not in KINDS:
        raise ValueError(
            f"`scheduler.dynamics_type` is {scheduler.dynamics_type!r}; a policy needs one of "
            f"{', '.join(KINDS)}"
        )
    kl_beta = float(training_args.kl_beta)
    if kl_beta > 0 and ref_noise_pred is None:
        raise ValueError(f"`ref_noise_pred` is missing; with `kl_beta` {kl_beta} it is needed")
    kind = KINDS[scheduler.dynamics_type]
    level = float(scheduler.noise_level)
    coeffs = _coefficients(t, t_next, scheduler.sigmas, level, kind, len(latents), latents.device)
    adv = advantage.clamp(*training_args.adv_clip_range)
    low, high = training_args.clip_range
    reference = ref_noise_pred if kl_beta > 0 else None
    transition = tail.Transition(
        noise_pred,
        latents,
        next_latents,
        coeffs,
        old_next_latents_mean,
        old_log_prob,
        reference,
    )
    bounds = tail.Bounds(-low, high, math.inf)
    objective = tail.plain if old_next_latents_mean is None else tail.closed_form
    found = objective(transition, adv, bounds)
    loss = found.loss
    policy_loss = loss.detach()
    kl_info = {}
    if found.from_reference is not None:
        share = _kl_share(coeffs, training_args.kl_type == "v-based")
        kl_div = found.from_reference.dot(share).float()
        kl_loss = kl_beta * kl_div
        loss = loss + kl_loss
        kl_info = {"kl_div": kl_div.detach(), "kl_loss": kl_loss.detach()}
    excess = found.excess()
    ratio = (excess + tail.number(1.0, excess)).float()
    negative = -adv
    above, below = found.above_and_below()
    return TrainingLoss(
        loss,
        {
            "ratio": ratio,
            "unclipped_loss": (negative * ratio).float(),
            "clipped_loss": (negative * ratio.clamp(1 + low, 1 + high)).float(),
            "policy_loss": policy_loss,
            **kl_info,
            "loss": loss.detach() if kl_info else policy_loss,
            "clip_frac_high": above,
            "clip_frac_low": below,
            "clip_frac_total": above + below,
        },
    )


def _coefficients(
    t: float | Tensor,
    t_next: float | Tensor,
    sigmas: Tensor,
    level: float,
    kind: SdeKind,
    batch: int,
    device: torch.device,
) -> StepCoefficients:
    """[1, B] of the steps from ``t`` to ``t_next``, kept where the host knows all the numbers."""
    if device.type != "cpu" or not all(steps.known(x) for x in (t, t_next, sigmas)):
        return _coefficients_of(t, t_next, sigmas[1], level, kind, batch, device)
    top = steps.numbers(sigmas)[1]
    return _known_coefficients(_key(t), _key(t_next), top, level, kind, batch)


Key = tuple[tuple[float, ...], torch.dtype] | float  # a tensor's numbers and dtype, or a number


def _key(x: float | Tensor) -> Key:
    return (steps.numbers(x), x.dtype) if isinstance(x, Tensor) else x


@functools.lru_cache(maxsize=256)
def _known_coefficients(
    t: Key, t_next: Key, top: float, level: float, kind: SdeKind, batch: int
) -> StepCoefficients:
    cpu = torch.device("cpu")
    with torch.inference_mode(False):
        now, following = (
            torch.tensor(x[0], dtype=x[1], device=cpu) if isinstance(x, tuple) else x
            for x in (t, t_next)
        )
        return _coefficients_of(now, following, top, level, kind, batch, cpu)


def _coefficients_of(
    t: float | Tensor,
    t_next: float | Tensor,
    top: float | Tensor,
    level: float,
    kind: SdeKind,
    batch: int,
    device: torch.device,
) -> StepCoefficients:
    now, following = (steps.on_device(steps.number(x, device), device) / 1000 for x in (t, t_next))
    return steps.coefficients_at(now, following, level, kind, steps.top_where_one(now, top), batch)


@tail.kept
def _kl_share(coeffs: StepCoefficients, of_velocities: bool) -> Tensor:
    """What of each sample's ``mean((mean - ref)^2)`` is in ``kl_div``, [B]."""
    one = torch.ones_like(coeffs.b[0])
    return (one / coeffs.b[0] ** 2 if of_velocities else one) / len(one)
