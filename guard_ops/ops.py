"""The public ops: check, dispatch to a backend, assemble."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import autograd, loss_call, objective, transitions
from .backends import select
from .config import GuardConfig
from .loss_call import LossCall
from .objective import Metrics
from .schedule import StepCoefficients
from .statistics import RatioStatistics
from .transitions import LossArguments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_ARTICLE = GuardConfig.article()


class SdeStep(NamedTuple):
    """What :func:`sde_step` returns."""

    prev_sample: Tensor  # [B, *latent], dtype of the sample
    mean: Tensor  # [B, *latent], float32 (float64 if an input is)
    log_prob: Tensor  # [B], same
    noise: Tensor | None  # [B, *latent]; None when it came from a seed


class LogRatio(NamedTuple):
    """What :func:`log_ratio` returns, each [K, B] ([B] for one step)."""

    log_ratio: Tensor
    kl_old: Tensor


class GuardLossOutput(NamedTuple):
    """What :func:`guard_loss` returns; only ``loss`` carries a gradient."""

    loss: Tensor  # []
    log_ratio: Tensor  # [K, B]
    excess: Tensor  # [K, B] r_hat - 1
    weights: Tensor  # [K, B] balance weights
    kl: Tensor  # [K, B] to the reference model; 0 without one
    metrics: Metrics  # of [K]


def sde_step(
    model_output: Tensor,
    sample: Tensor,
    coeffs: StepCoefficients,
    *,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    reduction: str = "mean",
) -> SdeStep:
    """One stochastic denoising step of the rollout: ``y = a x + b v + s noise``.

    Args:
        model_output: velocity v, [B, *latent]. sample: x, the same shape. (Or both
            [K, B, *latent] with ``coeffs`` of shape [K] or [K, B].)
        coeffs: ``schedule[k]``.
        generator, noise, seed: where the noise comes from: a generator (default: the global one),
            the tensor itself, or a seed (:func:`guard_ops.philox_seed`, or an int) from which
            :func:`guard_loss` regenerates it, so that it need not be stored. At most one.
        reduction: of ``log_prob`` over the latent: "mean" or "sum".

    Returns:
        SdeStep. ``mean`` keeps float32, so the mean form is exactly 1 on policy; ``log_prob`` is
        that of the returned ``prev_sample``: ``-kappa (y - mean)^2 - log s - log sqrt(2 pi)``
        (``+inf`` for a deterministic step of a Gaussian).

    Raises:
        ValueError: shapes, devices or more than one source of noise; inputs that require grad.
        TypeError: dtypes.
    """
    shape = transitions.check_shape(model_output, coeffs)
    given = [n for n, v in (("generator", generator), ("noise", noise), ("seed", seed))
             if v is not None]  # fmt: skip
    if len(given) > 1:
        raise ValueError(f"the noise is given by {' and '.join(given)}; it needs at most one")
    _check_reduction(reduction)
    device = model_output.device
    v = transitions.latents("model_output", model_output, shape, device)
    x = transitions.latents("sample", sample, shape, device)
    for name, value in (("model_output", v), ("sample", x)):
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"`{name}` requires grad: sde_step is the rollout and has no gradient; call it "
                "under torch.no_grad()"
            )
    full = transitions.expand_coefficients(coeffs, shape)
    key = None
    if seed is not None:
        key = transitions.seeds(seed, shape, device)
    elif noise is None:
        noise = torch.randn(
            shape.full(),
            generator=generator,
            dtype=transitions.compute_dtype(model_output, sample),
            device=device,
        )
    eps = None if noise is None else transitions.constant("noise", noise, shape, device)
    y, mean, square = select(device).sde_step(v, x, full.table, eps, key)
    numel = v.shape[-1]
    scale = full.kappa / numel if reduction == "mean" else full.kappa
    exponent = torch.where(square == 0, 0.0, -scale * square)
    log_prob = objective.log_density(exponent, full, numel, reduction).to(mean.dtype)
    y, mean = (x.reshape(shape.full()) for x in (y, mean))
    return SdeStep(y, mean, log_prob.reshape(shape.leading()), noise)


def log_ratio(
    model_output: Tensor,
    *,
    coeffs: StepCoefficients,
    sample: Tensor | None = None,
    prev_sample: Tensor | None = None,
    old_mean: Tensor | None = None,
    old_model_output: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    old_log_prob: Tensor | None = None,
    model_output_uncond: Tensor | None = None,
    guidance_scale: float | None = None,
    reduction: str = "mean",
) -> LogRatio:
    """``log p_new(y) - log p_old(y)`` and ``KL(old || new)``, differentiable in the velocities.

    Args: as :func:`guard_loss`.

    Returns:
        LogRatio, [K, B] each ([B] for one step), float32 (float64 if an input is). ``kl_old`` is
        NaN in the log-prob form, which cannot know it.
    """
    shape = transitions.check_shape(model_output, coeffs)
    t, full, old = loss_call.prepare(
        shape,
        LossArguments(
            model_output, model_output_uncond, None, sample, prev_sample, old_mean,
            old_model_output, noise, seed, coeffs, guidance_scale, old_log_prob,
            config=_ARTICLE,  # torch.compile of 2.11 cannot find a default's origin
        ),
    )  # fmt: skip
    _check_reduction(reduction)
    old = None if old is None else old.double()
    sums = autograd.transition_sums(select(model_output.device), t)
    log_r, kl_old, _ = objective.log_ratio_and_kl(sums, full, t[0].shape[-1], reduction, old)
    out = [x.to(t.compute_dtype()).reshape(shape.leading()) for x in (log_r, kl_old)]
    return LogRatio(*out)


def log_prob(
    model_output: Tensor,
    *,
    sample: Tensor,
    prev_sample: Tensor,
    coeffs: StepCoefficients,
    reduction: str = "mean",
) -> Tensor:
    """``log p(y)`` of the policy, [K, B] ([B] for one step), differentiable in ``model_output``.

    ``-kappa (y - mean)^2 - log s - log sqrt(2 pi)`` averaged (or summed) over the latent. To form
    a ratio use :func:`log_ratio`: the difference of two of these has lost its digits.
    """
    leading = transitions.check_shape(model_output, coeffs).leading()
    zero = torch.zeros(leading, dtype=torch.float64, device=model_output.device)
    return log_ratio(
        model_output,
        coeffs=coeffs,
        sample=sample,
        prev_sample=prev_sample,
        old_log_prob=zero,
        reduction=reduction,
    ).log_ratio


def guard_loss(
    model_output: Tensor,
    *,
    advantages: Tensor,
    coeffs: StepCoefficients,
    config: GuardConfig | None = None,
    sample: Tensor | None = None,
    prev_sample: Tensor | None = None,
    old_mean: Tensor | None = None,
    old_model_output: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    old_log_prob: Tensor | None = None,
    ref_model_output: Tensor | None = None,
    model_output_uncond: Tensor | None = None,
    guidance_scale: float | None = None,
    step_weights: Tensor | None = None,
    statistics: RatioStatistics | None = None,
    process_group: ProcessGroup | None = None,
) -> GuardLossOutput:
    """The GRPO-Guard policy loss over K steps: loss, gradient and diagnostics in one pass.

    ``mean_i sum_k w_ki max(-A r_hat, -A clip(r_hat)) + kl_beta mean_ki KL(new || ref)``.

    Args:
        model_output: v, [K, B, *latent], or [B, *latent] for one step; the only operand (with
            ``model_output_uncond``) that is differentiated.
        advantages: [B], or [K, B]; any floating dtype, like every operand.
        coeffs: ``schedule[...]`` of shape [] (one step), [K] or [K, B].
        config: a GuardConfig; default ``GuardConfig.article()``.
        sample, prev_sample, old_mean | sample, prev_sample, old_model_output |
        old_model_output, noise | old_model_output, seed | sample, prev_sample, old_log_prob:
            the behaviour policy, in exactly one of the forms mean, velocity, noise, seeded
            (:func:`guard_ops.philox_seed`) and log-prob ([K, B]); latents shaped as v.
        ref_model_output: the reference model's velocity, for ``kl_beta``.
        model_output_uncond, guidance_scale: classifier-free guidance,
            ``v = uncond + scale (v - uncond)``; ``old_model_output`` is then the combined one.
        step_weights: [K, B] instead of ``config.balance``.
        statistics: RatioNorm's mean and std from elsewhere (micro-batches, running average).
        process_group: compute RatioNorm's statistics over the ranks of this group.

    Returns:
        GuardLossOutput; float32 diagnostics (float64 if an operand is), [B] for one step.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it needs.
    """
    given = LossArguments(
        model_output, model_output_uncond, ref_model_output, sample, prev_sample, old_mean,
        old_model_output, noise, seed, coeffs, guidance_scale, old_log_prob, advantages,
        step_weights, _ARTICLE if config is None else config, statistics, process_group,
    )  # fmt: skip
    plain = loss_call.plain_call(given)
    call = loss_call.check(given) if plain is None else loss_call.of(plain, given)
    if call.fused:
        loss, per_row, rows = autograd.guard_loss(
            call.backend, call.t, call.problem, call.plain, model_output, model_output_uncond
        )
    else:
        loss, per_row, rows = _composed(call, process_group)
    if call.shape.one_step:
        per_row, rows = per_row.squeeze(1), rows.squeeze(1)
    log_r, excess, weights, kl = per_row.unbind(0)
    return GuardLossOutput(loss, log_r, excess, weights, kl, Metrics(*rows.unbind(0)))


def _composed(call: LossCall, process_group: ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """What a fused backend's ``guard_loss`` returns, from its sums and objective.py."""
    t, problem, coeffs = call.t, call.problem, call.coeffs
    advantages, old_log_prob = problem.advantages.double(), problem.old_log_prob
    old_log_prob = None if old_log_prob is None else old_log_prob.double()
    step_weights = None if problem.step_weights is None else problem.step_weights.double()
    mean_std, config = problem.mean_std, problem.config
    sums = autograd.transition_sums(call.backend, t)
    numel = t.model_output.shape[-1]
    log_r, kl_old, kl = objective.log_ratio_and_kl(
        sums, coeffs, numel, config.reduction, old_log_prob
    )
    if process_group is not None and config.ratio_norm == "standardize":
        whole = advantages.isfinite() & (kl.isfinite() if config.kl_beta else True)
        seen = torch.where(whole, log_r.detach(), float("nan"))
        merged = RatioStatistics(log_r.shape[0], log_r.device).update(seen)
        merged.all_reduce(process_group)
        mean_std = torch.stack([merged.mean, merged.std])
    result = objective.evaluate(
        log_r,
        kl_old,
        kl,
        advantages,
        coeffs,
        config,
        step_weights,
        None if mean_std is None else (mean_std[0], mean_std[1]),
    )
    per_row = torch.stack([log_r.detach(), result.excess, result.weights, kl.detach()])
    dtype = t.compute_dtype()
    return result.loss.to(dtype), per_row.to(dtype), torch.stack(result.metrics).to(dtype)


class LossAndGrad(NamedTuple):
    """What :func:`guard_loss_and_grad` returns."""

    loss: Tensor  # []
    grad: Tensor | tuple[Tensor, Tensor]  # like model_output; with guidance, and its uncond


def guard_loss_and_grad(
    model_output: Tensor,
    *,
    advantages: Tensor,
    coeffs: StepCoefficients,
    config: GuardConfig | None = None,
    sample: Tensor | None = None,
    prev_sample: Tensor | None = None,
    old_mean: Tensor | None = None,
    old_model_output: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    old_log_prob: Tensor | None = None,
    ref_model_output: Tensor | None = None,
    model_output_uncond: Tensor | None = None,
    guidance_scale: float | None = None,
    step_weights: Tensor | None = None,
    statistics: RatioStatistics | None = None,
    process_group: ProcessGroup | None = None,
) -> LossAndGrad:
    """:func:`guard_loss` for callers that push the gradient themselves (pipelines, offloading).

    Returns:
        (loss, d loss / d model_output), or (loss, (d / d model_output, d / d model_output_uncond))
        with classifier-free guidance; nothing is left to run backward through.
    """
    given = LossArguments(
        model_output, model_output_uncond, ref_model_output, sample, prev_sample, old_mean,
        old_model_output, noise, seed, coeffs, guidance_scale, old_log_prob, advantages,
        step_weights, _ARTICLE if config is None else config, statistics, process_group,
    )  # fmt: skip
    guided = model_output_uncond is not None
    plain = loss_call.plain_call(given, keep=False)
    if plain is None:
        return _loss_and_grad(given, guided)
    loss, *grads = plain.backend.guard_loss_plain(
        plain.operands, plain.mean_std, given.config, coeffs.gaussian, True, guided
    )[:3]
    grad = plain.operands.shaped(grads[0])
    return LossAndGrad(loss, (grad, plain.operands.shaped(grads[1])) if guided else grad)


def _loss_and_grad(given: LossArguments, guided: bool) -> LossAndGrad:
    """:func:`guard_loss_and_grad` of any call at all."""
    with torch.enable_grad():  # which forbids constants that require grad
        call = loss_call.check(loss_call.without_history(given))
    if call.fused:
        with torch.no_grad():
            loss, *grads = call.backend.guard_loss(call.t, *call.problem, True, guided)[:3]
    elif torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"the {call.backend.NAME!r} backend makes this gradient by autograd, which inference "
            "mode forbids; call guard_loss_and_grad under torch.no_grad()"
        )
    else:
        with torch.enable_grad():
            leaves = [x.requires_grad_() for x in call.t[:2] if x is not None]
            loss, *_ = _composed(call, given.process_group)
            grads = torch.autograd.grad(loss, leaves)
    shaped = [grad.view(given.model_output.shape) for grad in grads[: 1 + guided]]
    return LossAndGrad(loss.detach(), (shaped[0], shaped[1]) if guided else shaped[0])


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"`reduction` is {reduction!r}; it needs one of mean, sum")
