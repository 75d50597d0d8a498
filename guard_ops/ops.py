"""The rollout's step, and the log-ratio for custom objectives; the loss is in loss.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import autograd, masks, objective, ranks, transitions
from .backends import select
from .options import LogRatioOptions, Names, takes
from .schedule import StepCoefficients
from .transitions import Latents, Transitions, check_tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

_LOG_RATIO = Names(LogRatioOptions)


class SdeStep(NamedTuple):
    """What :func:`sde_step` returns."""

    prev_sample: Tensor  # [B, *latent], dtype of the sample
    mean: Tensor  # [B, *latent], float32 (float64 if an input is)
    log_prob: Tensor  # [B], dtype of the mean
    noise: Tensor | None  # [B, *latent]; None if it came from a seed


class LogRatio(NamedTuple):
    """What :func:`log_ratio` returns, each [K, B] ([B] for one step)."""

    log_ratio: Tensor
    kl_old: Tensor


def sde_step(
    model_output: Tensor,
    sample: Tensor,
    coeffs: StepCoefficients,
    *,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    model_output_uncond: Tensor | None = None,
    guidance_scale: float | None = None,
    mask: Tensor | None = None,
    latent_group: ProcessGroup | None = None,
    latent_offset: int | None = None,
    reduction: str = "mean",
) -> SdeStep:
    """One stochastic denoising step of the rollout: ``y = a x + b v + s noise``.

    Args:
        model_output: velocity v, [B, *latent]. sample: x, the same shape. (Or both
            [K, B, *latent] with ``coeffs`` of shape [K] or [K, B].)
        coeffs: ``schedule[k]``.
        generator, noise, seed: where the noise comes from: a generator (default: the global one),
            the tensor itself, or this step's part of :func:`guard_ops.philox_seed`, from which
            :func:`guard_loss` regenerates it, so that it need not be stored. At most one.
        model_output_uncond, guidance_scale: classifier-free guidance, both or neither: the mean's
            velocity is ``uncond + scale (model_output - uncond)``, rounded as :func:`guard_loss`
            rounds that of the same pair. It is combined while it is read, and never written.
        mask: which elements ``log_prob`` is over, as :func:`guard_loss` takes it; ``prev_sample``
            and ``mean`` are those of a call without it.
        latent_group, latent_offset: where each rank has a part of the latents, as for
            :func:`guard_loss`: ``log_prob`` is that of the whole ones.
        reduction: of ``log_prob`` over the latent: "mean" or "sum".

    Returns:
        SdeStep. ``mean`` stays float32, so that the mean form's ratio is exactly 1 on policy;
        ``log_prob`` is that of the returned ``prev_sample``:
        ``-kappa (y - mean)^2 - log s - log sqrt(2 pi)`` (``+inf`` for a deterministic step of a
        Gaussian).

    Raises:
        ValueError: shapes or devices differ, noise has more than one source, one half of the
            guidance is missing or its scale not finite in float32, or an input requires grad.
        TypeError: a dtype is not one that kernels take.
    """
    transitions.check_reduction(reduction)
    scale = transitions.check_guidance(
        {"model_output_uncond": model_output_uncond, "guidance_scale": guidance_scale}
    )
    if latent_group is not None:
        ranks.check_group("latent_group", latent_group)
    offset = transitions.check_offset(latent_offset, seed)
    step = _step(
        model_output, model_output_uncond, scale, sample, coeffs, generator, noise, seed, mask,
        latent_group, offset,
    )  # fmt: skip
    shape, numel = step.shape, step.numel
    full = StepCoefficients._of(step.table, coeffs.gaussian, ())
    kappa = full.kappa / numel if reduction == "mean" else full.kappa
    exponent = torch.where(step.square == 0, 0.0, -kappa * step.square)
    log_prob = objective.log_density(exponent, full, numel, reduction).to(step.mean.dtype)
    y, mean = (x.reshape(shape.full) for x in (step.prev_sample, step.mean))
    return SdeStep(y, mean, log_prob.reshape(shape.leading()), step.noise)


def next_sample(
    model_output: Tensor, sample: Tensor, coeffs: StepCoefficients, *, seed: Tensor
) -> Tensor:
    """:func:`sde_step`'s ``prev_sample`` alone: one operator, where a rollout needs no density."""
    step = _step(model_output, None, 1.0, sample, coeffs, None, None, seed)
    return step.prev_sample.reshape(step.shape.full)


class _Step(NamedTuple):
    """What a backend makes of a step, latents as [K, B, D]."""

    prev_sample: Tensor
    mean: Tensor
    square: Tensor  # [K, B] sum of (y - mean)^2
    noise: Tensor | None
    shape: transitions.CallShape
    table: Tensor  # [5, K, B]
    numel: int | Tensor  # D: of all transitions, or [K, B]


def _step(
    model_output: Tensor,
    model_output_uncond: Tensor | None,
    guidance_scale: float,
    sample: Tensor,
    coeffs: StepCoefficients,
    generator: torch.Generator | None,
    noise: Tensor | None,
    seed: Tensor | None,
    mask: Tensor | None = None,
    latent_group: ProcessGroup | None = None,
    latent_offset: int = 0,
) -> _Step:
    """Checks the arguments and takes the step; raises as :func:`sde_step` says."""
    shape = transitions.check_shape(model_output, coeffs)
    given = [n for n, v in (("generator", generator), ("noise", noise), ("seed", seed))
             if v is not None]  # fmt: skip
    if len(given) > 1:
        raise ValueError(f"the noise is given by {' and '.join(given)}; it needs at most one")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"`generator` is a {type(generator).__name__}; it needs a torch.Generator")
    device = model_output.device
    operands = {"model_output": model_output, "sample": sample}
    if model_output_uncond is not None:
        operands["model_output_uncond"] = model_output_uncond
    for name, value in operands.items():
        operands[name] = transitions.latents(name, value, shape, device)
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"`{name}` requires grad: sde_step is the rollout and has no gradient; call it "
                "under torch.no_grad()"
            )
    table = transitions.full_table(coeffs, shape, model_output)
    key = None
    if seed is not None:
        key = transitions.seeds(seed, shape, device, latent_offset)
    elif noise is None:
        noise = torch.randn(
            shape.full,
            generator=generator,
            dtype=transitions.compute_dtype(*operands.values()),
            device=device,
        )
    if noise is not None:
        operands["noise"] = transitions.latents("noise", noise, shape, device)
        transitions.check_constant("noise", noise)
    if mask is not None:
        operands["mask"] = masks.flat(mask, shape, device)
    latents = Latents._make([operands.get(name) for name in Latents._fields])
    t = Transitions(latents, key, table, guidance_scale)
    y, mean, square = select(device).sde_step(t)
    numel = transitions.numel_of(t, transitions.elements(t))
    if latent_group is not None:
        square, numel = ranks.total(torch.stack([square, transitions.counted(t)]), latent_group)
        numel = numel.clamp(min=1)
    return _Step(y, mean, square, noise, shape, table, numel)


@takes(LogRatioOptions, reduction="mean")
def log_ratio(model_output: Tensor, **options: Unpack[LogRatioOptions]) -> LogRatio:
    """``log p_new(y) - log p_old(y)`` and ``KL(old || new)``, differentiable in the velocities.

    Args: as :func:`guard_loss`; reduction: over the latent, "mean" or "sum".

    Returns:
        LogRatio, [K, B] each ([B] for one step), float32 (float64 if an input is). ``kl_old`` is
        NaN in the log-prob form, which cannot know it.
    """
    transitions.check_options("log_ratio", options, _LOG_RATIO)
    coeffs, reduction = options["coeffs"], options.get("reduction", "mean")
    shape = transitions.check_shape(model_output, coeffs)
    t = transitions.gather(shape, model_output, options)
    old = transitions.old_log_prob(shape, model_output, options)
    transitions.check_reduction(reduction)
    sums = autograd.transition_sums(select(model_output.device), t)
    latent_group = options.get("latent_group")
    if latent_group is None:
        elements = transitions.elements(t)
    else:
        ranks.check_group("latent_group", latent_group)
        sums, elements = autograd.over_shards(sums, t, latent_group)
    log_r, kl_old, _ = objective.log_ratio_and_kl(
        sums,
        StepCoefficients._of(t.coefficients, coeffs.gaussian, ()),
        transitions.numel_of(t, elements),
        reduction,
        None if old is None else old.double(),
    )
    out = [x.to(t.compute_dtype()).reshape(shape.leading()) for x in (log_r, kl_old)]
    return LogRatio(*out)


def log_prob(
    model_output: Tensor,
    *,
    sample: Tensor,
    prev_sample: Tensor,
    coeffs: StepCoefficients,
    mask: Tensor | None = None,
    latent_group: ProcessGroup | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``log p(y)`` of the policy, [K, B] ([B] for one step), differentiable in ``model_output``.

    ``-kappa (y - mean)^2 - log s - log sqrt(2 pi)`` averaged (or summed) over the latent, or over
    its elements that ``mask`` counts; ``mask`` and ``latent_group`` are those of
    :func:`guard_loss`. To form a ratio use :func:`log_ratio`: the difference of two of these has
    lost its digits.
    """
    leading = transitions.check_shape(model_output, coeffs).leading()
    for name, value in (("sample", sample), ("prev_sample", prev_sample)):
        check_tensor(name, value)
    zero = torch.zeros(leading, dtype=torch.float64, device=model_output.device)
    return log_ratio(
        model_output,
        coeffs=coeffs,
        sample=sample,
        prev_sample=prev_sample,
        old_log_prob=zero,
        mask=mask,
        latent_group=latent_group,
        reduction=reduction,
    ).log_ratio
