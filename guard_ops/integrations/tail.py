"""From a velocity to a framework's loss: what the frameworks' ``training_loss`` functions share.

Their ratios are all ``exp(z)`` with ``z`` linear in a transition's two sums. Where ``z`` is one of
:func:`guard_ops.guard_loss`'s (:func:`plain`, :func:`closed_form`), that computes loss and gradient
in one pass; otherwise (:func:`of_sums`) the latents are read once forward and once backward.
Nothing waits for a device.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import autograd, loss, objective, transitions
from ..backends import select
from ..config import GuardConfig, RatioNorm
from ..schedule import StepCoefficients


class Transition(NamedTuple):
    """What a script has of one timestep; latents are [B, *latent]."""

    model_output: Tensor  # v
    sample: Tensor  # x
    prev_sample: Tensor  # y
    coeffs: StepCoefficients  # [1, B]
    old_mean: Tensor | None = None  # or
    old_log_prob: Tensor | None = None  # [B]
    ref_model_output: Tensor | None = None  # where the loss has a KL to a reference


class Bounds(NamedTuple):
    """Where ratios and advantages are clipped: to ``1 - low`` and ``1 + high``, and ``+-adv``."""

    low: float
    high: float
    adv: float


class Exponent(NamedTuple):
    """``z = rates . sums + shared mean(S2) + offset``, in float64."""

    rates: Tensor  # [3, B], of S1, S2 and the reference's sum (0)
    log_ratio: Tensor  # [3, B], the rates of log r
    shared: Tensor | None = None  # []; its mean is over the batch


class Clipped(NamedTuple):
    """A clipped surrogate and what frameworks log of its ratio.

    ``loss`` and ``from_reference`` carry gradients, nothing else does.
    """

    loss: Tensor  # [], mean over the batch
    log_ratio: Tensor  # [B]
    excess: Tensor  # [B] ratio - 1
    high: Tensor  # [] the share of the batch whose ratio is above its bound
    low: Tensor  # [] and below
    from_reference: Tensor | None = None  # [B] mean over the latent of (mean - reference's mean)^2
    kl: Tensor | None = None  # [B] to the reference, which is in ``loss`` already


def plain(
    t: Transition,
    advantages: Tensor,
    bounds: Bounds,
    weights: Tensor | None = None,
    kl_beta: float = 0.0,
) -> Clipped:
    """``mean_i w max(-A r, -A clip(r))``, ``r`` the plain ratio. advantages, weights: [B].

    With a reference and ``kl_beta``, that times the mean of ``mean((mean - ref)^2) / (2 s^2)``, the
    KL of Gaussians, is added in the same pass; without it ``from_reference`` is for another KL.
    """
    if t.ref_model_output is None:
        return _one_pass(t, advantages, bounds, "none", weights)
    if kl_beta:
        return _one_pass(t, advantages, bounds, "none", weights, kl_beta)
    rates = log_ratio_rates(t.coeffs, numel(t))
    return of_sums(t, advantages, bounds, Exponent(rates, rates), weights)


def closed_form(
    t: Transition,
    advantages: Tensor,
    bounds: Bounds,
    scale: Tensor,
    weights: Tensor | None = None,
) -> Clipped:
    """The same with ``exp(scale log r + mean((mean - old)^2) / (2 scale))``. scale: [B].

    Of a Gaussian, whose ``s`` the scale then has to be, this is the paper's RatioNorm.
    """
    if t.ref_model_output is None and t.coeffs.gaussian:
        return _one_pass(t, advantages, bounds, "closed_form", weights)
    log_ratio = log_ratio_rates(t.coeffs, numel(t))
    rates = log_ratio * scale
    rates[1] += 1 / (2 * scale * numel(t))
    return of_sums(t, advantages, bounds, Exponent(rates, log_ratio), weights)


def log_ratio_rates(coeffs: StepCoefficients, numel: int) -> Tensor:
    """[3, B] of ``log r = kappa/D (2 S1 - S2)``; the log-prob form's S1 is 0."""
    rate = coeffs.kappa[0] / numel
    return torch.stack([2 * rate, -rate, torch.zeros_like(rate)])


def numel(t: Transition) -> int:
    """Elements of a latent."""
    return t.model_output.numel() // len(t.model_output)


def _one_pass(
    t: Transition,
    advantages: Tensor,
    bounds: Bounds,
    norm: RatioNorm,
    weights: Tensor | None,
    kl_beta: float = 0.0,
) -> Clipped:
    compiling = torch.compiler.is_compiling()
    make = _config.__wrapped__ if compiling else _config
    config = make(norm, bounds, kl_beta)
    one = None if compiling or t.coeffs.device.type != "cpu" else _one_step(t.coeffs)
    if one is not None:  # [B] numbers come in and go out, with no operator to reshape them
        given = t._asdict() | {"coeffs": one}
        v = given.pop("model_output")
        found = loss.guard_loss(
            v, advantages=advantages, config=config, step_weights=weights, **given
        )
        log_ratio, excess, kl = found.log_ratio, found.excess, found.kl
        high, low = found.metrics.clip_fraction_high, found.metrics.clip_fraction_low
    else:
        given = _steps(t)
        found = loss.guard_loss(
            given.pop("model_output"),
            advantages=advantages.unsqueeze(0),
            config=config,
            step_weights=None if weights is None else weights.unsqueeze(0),
            **given,
        )
        log_ratio, excess, kl = found.log_ratio[0], found.excess[0], found.kl[0]
        high, low = found.metrics.clip_fraction_high[0], found.metrics.clip_fraction_low[0]
    return Clipped(found.loss, log_ratio, excess, high, low, kl=kl if kl_beta else None)


@functools.lru_cache(maxsize=256)
def _one_step(coeffs: StepCoefficients) -> StepCoefficients | None:
    """[1, B] coefficients on the CPU as those of one step, [], if all samples are at one.

    It is looked at once: the coefficients of steps that the host looks up are kept.
    """
    with torch.inference_mode(False):
        first = coeffs.table[:, 0, :1]
        if not torch.equal(coeffs.table[:, 0], first.expand_as(coeffs.table[:, 0])):
            return None
        return StepCoefficients._of(first[:, 0].clone(), coeffs.gaussian, coeffs.deterministic)


@functools.lru_cache(maxsize=64)
def _config(norm: RatioNorm, bounds: Bounds, kl_beta: float) -> GuardConfig:
    return GuardConfig(
        norm,
        clip_low=bounds.low,
        clip_high=bounds.high,
        adv_clip=bounds.adv,
        balance="none",
        kl_beta=kl_beta,
    )


def _steps(t: Transition) -> dict[str, Any]:
    """The transition's tensors as those of one step, [1, B, ...]."""
    return {
        name: value.unsqueeze(0) if isinstance(value, Tensor) else value
        for name, value in t._asdict().items()
    }


def of_sums(
    t: Transition,
    advantages: Tensor,  # [B]
    bounds: Bounds,
    exponent: Exponent,
    weights: Tensor | None = None,  # [] or [B]
) -> Clipped:
    """``mean_i w max(-A r, -A clip(r))`` with any ``r = exp(z)``: two passes.

    In the log-prob form ``z`` is log r, so the density's constants and the old log-prob are in it.
    """
    given = _steps(t)
    v = given.pop("model_output")
    shape = transitions.check_shape(v, t.coeffs)
    operands = transitions.gather(shape, v, given)
    offset = None
    if t.old_log_prob is not None:
        transitions.old_log_prob(shape, v, given)  # checks it
        nothing = torch.zeros_like(t.coeffs.kappa)
        constants = objective.log_density(nothing, t.coeffs, numel(t), "mean")
        offset = constants[0] - t.old_log_prob
    sums = autograd.transition_sums(select(v.device), operands)  # [3, 1, B]
    share = -1 / shape.batch
    slope = advantages.detach().clamp(-bounds.adv, bounds.adv)
    slope = slope * (share if weights is None else share * weights.detach())
    result, excess, log_ratio = _Surrogate.apply(  # type: ignore[no-untyped-call]
        sums, slope, bounds, *exponent, offset
    )
    outside = torch.stack([excess > bounds.high, excess < -bounds.low])
    high, low = outside.mean(1, dtype=torch.float32).unbind()
    from_reference = None if t.ref_model_output is None else sums[2, 0] / numel(t)
    return Clipped(result.float(), log_ratio, excess, high, low, from_reference)


class _Surrogate(torch.autograd.Function):
    """The clipped surrogate of the sums, with its own gradient.

    Autograd over it takes three times the operators, which cost more than the latents do.
    """

    @staticmethod
    def forward(
        ctx: Any,
        sums: Tensor,  # [3, 1, B] float64
        slope: Tensor,  # [B] -A w / B
        bounds: Bounds,
        rates: Tensor,
        log_ratio_rates: Tensor,
        shared: Tensor | None,
        offset: Tensor | None,  # [B]
    ) -> Any:
        rows = sums[:, 0]
        log_ratio = (log_ratio_rates * rows).sum(0)
        if offset is not None:
            log_ratio = log_ratio + offset
        z = log_ratio if rates is log_ratio_rates else (rates * rows).sum(0)
        if shared is not None:
            z = z + shared * rows[1].mean()
        excess = torch.expm1(z)
        free = slope * excess
        bound = slope * excess.clamp(-bounds.low, bounds.high)
        to_z = torch.where(free < bound, 0.0, slope + free)  # NaN stays one
        to_sums = rates * to_z
        if shared is not None:
            to_sums[1] += shared * to_z.mean()
        ctx.save_for_backward(to_sums)
        ctx.mark_non_differentiable(excess, log_ratio)
        return (torch.maximum(free, bound) + slope).sum(), excess, log_ratio

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        (to_sums,) = ctx.saved_tensors
        return ((to_sums * grad).unsqueeze(1), *(None,) * 6)
