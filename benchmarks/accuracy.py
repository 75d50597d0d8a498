"""How far the standardized ratio is from float64, and how many clips that decides wrongly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import guard_ops as go

from . import baselines
from .contenders import Inputs, make_inputs
from .workloads import READS, Workload

CLIP = 0.2
FORMS = ("velocity", "noise", "mean")
PLAIN = "plain PyTorch"


@dataclass(frozen=True)
class Accuracy:
    """One contender's ``r_hat`` under standardize against float64, at one drift and dtype."""

    contender: str
    dtype: str
    drift: float
    max_error: float  # of r_hat, over the batch
    wrong_clips: int  # samples on another side of 1 -+ CLIP than in float64
    batch: int


def measure_accuracy(
    workload: Workload, dtype: torch.dtype, drift: float, seed: int = 0
) -> list[Accuracy]:
    """Every contender on one rollout of one step, in ``dtype``.

    Float64 takes the same rounded tensors: the two velocities, the sample, and the next sample (or,
    for the noise form, the noise that form is given in its place). It needs no stored mean or
    log-prob, so what rounding those cost a contender is part of its error.
    """
    inputs = make_inputs(workload, dtype, drift, seed)
    truth = {form: exact_excess(inputs, form) for form in ("velocity", "noise")}
    found = {PLAIN: (plain_excess(inputs), truth["velocity"])}
    for form in FORMS:
        expected = truth["noise" if form == "noise" else "velocity"]
        found[f"guard_ops, {form} form"] = (our_excess(inputs, form), expected)
    return [
        Accuracy(
            name,
            str(dtype).removeprefix("torch."),
            drift,
            float((excess - expected).abs().max()),
            int((_side(excess) != _side(expected)).sum()),
            workload.batch,
        )
        for name, (excess, expected) in found.items()
    ]


def exact_excess(inputs: Inputs, form: str) -> Tensor:
    """``r_hat - 1`` [K, B] in float64 by the specification's difference form."""
    shape = (*inputs.model_output.shape[:2], *[1] * (inputs.model_output.ndim - 2))
    a, b, s, kappa = (
        c.unsqueeze(1).expand(shape[:2]).reshape(shape)
        for c in (inputs.coeffs.a, inputs.coeffs.b, inputs.coeffs.s, inputs.coeffs.kappa)
    )
    v_old = inputs.old_model_output.double()
    delta = b * (inputs.model_output.detach().double() - v_old)
    if form == "noise":
        e = s * inputs.noise.double()
    else:
        e = inputs.prev_sample.double() - (a * inputs.sample.double() + b * v_old)
    u = torch.expm1((kappa * (2 * delta * e - delta**2)).flatten(2).mean(-1))
    centred = u - u.mean(-1, keepdim=True)
    std = centred.square().mean(-1, keepdim=True).sqrt()
    floor = go.GuardConfig.article().std_floor
    return centred / torch.where(std > floor, std, 1.0)


def plain_excess(inputs: Inputs) -> Tensor:
    """``r_hat - 1`` [K, B] as a trainer has it: two float32 log-probs, subtracted."""
    with torch.no_grad():
        x, y = inputs.sample.flatten(0, 1), inputs.prev_sample.flatten(0, 1)
        new, old = (
            baselines.flow_sde_step(v.flatten(0, 1), x, y, inputs.step).log_prob
            for v in (inputs.model_output, inputs.old_model_output)
        )
        ratio = torch.exp(new - old).view(inputs.model_output.shape[:2])
        return (baselines.standardize(ratio) - 1).double()


def our_excess(inputs: Inputs, form: str) -> Tensor:
    """``r_hat - 1`` [K, B] of ``guard_loss``."""
    operands = {name: getattr(inputs, name) for name in READS[form] if name != "model_output"}
    out = go.guard_loss(
        inputs.model_output.detach(),
        advantages=inputs.advantages,
        coeffs=inputs.coeffs,
        config=go.GuardConfig.article(),
        **operands,
    )
    return out.excess.double()


def _side(excess: Tensor) -> Tensor:
    """-1, 0 or 1: below, inside or above the clip range."""
    return (excess > CLIP).int() - (excess < -CLIP).int()
