"""The tensors of a drawn case: a rollout in float64, rounded to its dtypes and laid out."""

from __future__ import annotations

import math
from typing import Any

import philox_truth
import torch
from strategies import FORMS, Case
from torch import Tensor

import guard_ops as go


def arguments(case: Case, reduction: str = "mean") -> dict[str, Any]:
    """What ``log_ratio`` and a KL term take; numbers follow from ``case.seed``."""
    return poison(case, _arguments(case, reduction))


def _arguments(case: Case, reduction: str) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(case.seed)
    leading = (case.batch,) if case.one_step else (case.steps, case.batch)
    shape = (*leading, *case.latent)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, dtype=torch.float64)

    def stored(name: str, value: Tensor) -> Tensor:
        return value.to(case.dtypes[name])

    coeffs = coefficients(case, draw)
    a, b, s = (
        x.reshape(x.shape + (1,) * (len(shape) - x.ndim)) for x in (coeffs.a, coeffs.b, coeffs.s)
    )
    values = {"sample": case.magnitude * normal(*shape), "noise": normal(*shape)}
    seed = go.philox_seed(case.seed, leading)
    if case.form == "seeded":
        z = philox_truth.normals(seed.reshape(-1, case.batch, 2), math.prod(case.latent))
        values["noise"] = z.view(shape)
    old = case.magnitude * normal(*shape)
    old_dtype = case.dtypes.get("old_model_output", torch.float64)
    old = old.to(old_dtype).double()
    far = torch.zeros(shape, dtype=torch.float64)
    if case.reach:  # some log-ratios are near `reach`: the mean moves to y, from sqrt(2 reach) s
        some = torch.rand(leading, generator=draw) < 0.4
        some = some.reshape(leading + (1,) * len(case.latent))
        elements = math.prod(case.latent)
        size = math.sqrt(2 * case.reach / (elements if reduction == "sum" else 1))
        if case.form != "seeded":
            values["noise"] = torch.where(some, size * values["noise"], values["noise"])
        far = torch.where(some, s / b * values["noise"], far)
    if case.shared in values and case.shared in FORMS[case.form]:
        first = values[case.shared].narrow(len(leading) - 1, 0, 1)
        values[case.shared] = first.expand(shape)
    mean = a * values["sample"] + b * old
    values["prev_sample"] = mean + s * values["noise"]
    moved = case.drift * s / b * normal(*shape)
    velocity = old + moved + far
    if case.drift == 0 and not case.reach:
        velocity = old
    values |= {"model_output": velocity, "old_model_output": old, "old_mean": mean}
    values["ref_model_output"] = old + 0.2 * case.magnitude * normal(*shape)
    if case.guidance_scale is not None:
        uncond = stored("model_output_uncond", case.magnitude * normal(*shape)).double()
        values["model_output_uncond"] = uncond
        if case.guidance_scale:
            values["model_output"] = uncond + (velocity - uncond) / case.guidance_scale

    given: dict[str, Any] = {"coeffs": coeffs}
    for name in case.dtypes:
        if name == "ref_model_output" or name not in values:
            continue
        given[name] = laid_out(stored(name, values[name]), case.layouts.get(name, "plain"), case)
    given["ref_model_output"] = laid_out(
        stored("ref_model_output", values["ref_model_output"]),
        case.layouts.get("ref_model_output", "plain"),
        case,
    )
    if case.form == "seeded":
        given["seed"] = seed
    if case.form == "log-prob":
        given["old_log_prob"] = _old_log_prob(case, coeffs, values, mean, reduction, leading, draw)
    if case.guidance_scale is not None:
        given["guidance_scale"] = case.guidance_scale
    return given


def loss_arguments(case: Case, config: go.GuardConfig, options: dict[str, Any]) -> dict[str, Any]:
    """What ``guard_loss`` takes."""
    given = _arguments(case, config.reduction) | {"config": config}
    if not config.kl_beta:
        del given["ref_model_output"]
    draw = torch.Generator().manual_seed(case.seed + 1)
    leading = (case.batch,) if case.one_step else (case.steps, case.batch)
    each = leading if options["advantages"] == "transition" else (case.batch,)
    size = {"zero": 0.0, "large": 20.0}.get(options["advantages"], 1.0)
    advantages = size * torch.randn(each, generator=draw, dtype=torch.float64)
    given["advantages"] = advantages.to(options["advantages_dtype"])
    if options["step_weights"]:
        given["step_weights"] = torch.rand(leading, generator=draw)
    if options["statistics"]:
        steps = None if case.one_step else case.steps
        seen = 0.1 * torch.randn(*leading[:-1], 9, generator=draw, dtype=torch.float64)
        given["statistics"] = go.RatioStatistics(steps).update(seen)
    return poison(case, given)


def coefficients(case: Case, draw: torch.Generator) -> go.StepCoefficients:
    schedule = go.SdeSchedule(case.sigmas, case.noise_level, case.kind)
    steps = torch.randint(len(schedule), (case.steps,), generator=draw)
    if case.one_step:
        return schedule[int(steps[0])]
    if case.per_transition:
        return schedule[torch.randint(len(schedule), (case.steps, case.batch), generator=draw)]
    return schedule[steps] if case.seed % 2 else schedule[steps.tolist()]


def laid_out(value: Tensor, layout: str, case: Case) -> Tensor:
    """The same numbers with other strides, among NaNs that nothing may read."""
    if layout == "transposed" and not case.one_step:
        return value.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels_last" and len(case.latent) > 1:
        return value.movedim(-1, -2).contiguous().movedim(-1, -2)
    if layout == "plain" or value.stride() != value.contiguous().stride():  # also what is expanded
        return value
    where = tuple(slice(1, 1 + n) for n in value.shape)
    sizes = tuple(n + 2 for n in value.shape)
    if layout == "spread":
        where, sizes = (..., slice(1, None, 2)), (*value.shape[:-1], 2 * value.shape[-1])
    elif layout == "offset":
        around = torch.full((value.numel() + 2,), math.nan, dtype=value.dtype)
        around[1:-1] = value.flatten()
        return around[1:-1].view(value.shape)
    around = torch.full(sizes, math.nan, dtype=value.dtype)
    around[where] = value
    return around[where]


def poison(case: Case, given: dict[str, Any]) -> dict[str, Any]:
    """With what is not finite where ``case.poisons`` say: step, sample, element."""
    for name, k, i, element, bad in case.poisons:
        if name not in given:
            continue
        if name == "statistics":
            mean = given[name].mean.clone()
            mean.view(-1)[k % mean.numel()] = bad
            given[name].mean = mean
            continue
        value = given[name].clone() if 0 in given[name].stride() else given[name]
        leading = min(value.ndim, 1 if case.one_step else 2)
        where = (k, i)[-leading:] + (element,) * (value.ndim - leading)  # [B] has no step
        value[tuple(n % size for n, size in zip(where, value.shape, strict=True))] = bad
        given[name] = value
    return given


def _old_log_prob(
    case: Case,
    coeffs: go.StepCoefficients,
    values: dict[str, Tensor],
    mean: Tensor,
    reduction: str,
    leading: tuple[int, ...],
    draw: torch.Generator,
) -> Tensor:
    """The behaviour policy's own, as the sample's dtype stores it."""
    y = values["prev_sample"].to(case.dtypes["prev_sample"]).double()
    square = ((y - mean) ** 2).reshape(*leading, -1)
    square = square.mean(-1) if reduction == "mean" else square.sum(-1)
    kappa, s = (
        x.reshape(x.shape + (1,) * (len(leading) - x.ndim)) for x in (coeffs.kappa, coeffs.s)
    )
    log_prob = -kappa * square
    if coeffs.gaussian:
        times = 1 if reduction == "mean" else math.prod(case.latent)
        log_prob = log_prob - times * (s.log() + 0.5 * math.log(2 * math.pi))
    dtype = torch.float64 if case.dtypes["sample"] == torch.float64 else torch.float32
    return log_prob.to(dtype)
