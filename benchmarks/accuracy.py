"""Measures how far ratios are from float64, and how many clip decisions differ for that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import guard_ops as go

from . import baselines
from .contenders import Inputs, config_of, make_inputs, on
from .workloads import Workload

DRIFTS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
CLIP = 0.2
FLOOR = 1e-8  # of the std, in every dtype: what is compared is the ratio, not when it is left alone
FORMS = ("velocity", "noise", "mean")
PLAIN = "plain PyTorch"


@dataclass(frozen=True)
class Ratios:
    """A contender's ratios on one rollout, as differences from 1, each [K, B] float64."""

    log_ratio: Tensor
    standardized: Tensor  # r_hat of the article, clipped at 0.2
    raw: Tensor  # r of Flow-GRPO and DanceGRPO, clipped at 1e-4
    closed_form: Tensor  # r_hat of the paper, clipped at 2e-6


# The clip of a published recipe -> the ratio that it clips.
CLIPS: dict[str, tuple[float, Callable[[Ratios], Tensor]]] = {
    "2e-6": (2e-6, lambda ratios: ratios.closed_form),
    "1e-4": (1e-4, lambda ratios: ratios.raw),
    "0.2": (CLIP, lambda ratios: ratios.standardized),
}


@dataclass(frozen=True)
class Accuracy:
    """One contender's ratios against float64, at one drift and dtype."""

    contender: str
    dtype: str
    drift: float
    log_ratio_error: float  # the largest error, relative to the largest log-ratio
    max_error: float  # the largest error of the standardized r_hat over the batch
    wrong_clips: int  # samples whose standardized r_hat and float64's differ in their side of CLIP
    wrong_share: dict[str, float]  # clip -> share of samples that differ in their side of it
    batch: int


def measure_accuracy(
    workload: Workload,
    dtype: torch.dtype,
    drift: float,
    seed: int = 0,
    backend: str | None = None,
    device: torch.device | str = "cpu",
) -> list[Accuracy]:
    """Every contender on one rollout of one step, in ``dtype``.

    Float64 is given the same rounded tensors: the two velocities, the sample, and the next sample
    (or, for the noise form, the noise). It needs no stored mean or log-prob, so what a contender
    loses by their rounding is part of its error.
    """
    inputs = make_inputs(workload, dtype, drift, seed, device)
    truth = {form: exact(inputs, form) for form in ("velocity", "noise")}
    found = {PLAIN: (plain(inputs), truth["velocity"])}
    for form in FORMS:
        expected = truth["noise" if form == "noise" else "velocity"]
        found[f"guard_ops, {form} form"] = (ours(inputs, form, backend), expected)
    return [
        Accuracy(
            name,
            str(dtype).removeprefix("torch."),
            drift,
            _largest(ratios.log_ratio - expected.log_ratio) / _largest(expected.log_ratio),
            _largest(ratios.standardized - expected.standardized),
            int((_side(ratios.standardized) != _side(expected.standardized)).sum()),
            {
                label: float((_side(of(ratios), clip) != _side(of(expected), clip)).double().mean())
                for label, (clip, of) in CLIPS.items()
            },
            workload.batch,
        )
        for name, (ratios, expected) in found.items()
    ]


def exact(inputs: Inputs, form: str) -> Ratios:
    """The ratios in float64, by the specification's difference form."""
    v_old = inputs.old_model_output.double()
    rows = v_old.shape[:2]
    a, b, s, kappa = (
        c.unsqueeze(1).expand(rows)
        for c in (inputs.coeffs.a, inputs.coeffs.b, inputs.coeffs.s, inputs.coeffs.kappa)
    )
    wide = (*rows, *[1] * (v_old.ndim - 2))
    delta = b.reshape(wide) * (inputs.model_output.detach().double() - v_old)
    if form == "noise":
        e = s.reshape(wide) * inputs.noise.double()
    else:
        mean = a.reshape(wide) * inputs.sample.double() + b.reshape(wide) * v_old
        e = inputs.prev_sample.double() - mean
    cross, square = ((delta * x).flatten(2).mean(-1) for x in (e, delta))
    log_ratio = kappa * (2 * cross - square)
    raw = torch.expm1(log_ratio)
    centred = raw - raw.mean(-1, keepdim=True)
    std = centred.square().mean(-1, keepdim=True).sqrt()
    return Ratios(
        log_ratio,
        centred / torch.where(std > FLOOR, std, 1.0),
        raw,
        torch.expm1(s * kappa * 2 * cross),
    )


def plain(inputs: Inputs) -> Ratios:
    """Ratios as a trainer forms them, of two float32 log-probs; the closed form is verl-omni's."""
    with torch.no_grad():
        x, y = inputs.sample.flatten(0, 1), inputs.prev_sample.flatten(0, 1)
        new, old = (
            baselines.flow_sde_step(v.flatten(0, 1), x, y, inputs.step)
            for v in (inputs.model_output, inputs.old_model_output)
        )
        rows = inputs.model_output.shape[:2]
        log_ratio = (new.log_prob - old.log_prob).view(rows)
        ratio = torch.exp(log_ratio)
        gap = (new.prev_sample_mean - old.prev_sample_mean).pow(2).flatten(1).mean(-1).view(rows)
        s = new.s.view(rows)
        closed = torch.exp((log_ratio + gap / (2 * s**2)) * s)
        return Ratios(
            log_ratio.double(),
            (baselines.standardize(ratio) - 1).double(),
            (ratio - 1).double(),
            (closed - 1).double(),
        )


def ours(inputs: Inputs, form: str, backend: str | None = None) -> Ratios:
    """The ratios of ``guard_loss`` under the three recipes."""

    def loss(objective: str) -> go.GuardLossOutput:
        with on(backend), torch.no_grad():
            return go.guard_loss(
                inputs.model_output.detach(),
                advantages=inputs.advantages,
                config=config_of(objective, inputs, std_floor=FLOOR),
                **inputs.form(form),
            )

    article, raw, paper = map(loss, ("article", "flow_grpo", "paper"))
    return Ratios(
        *(x.double() for x in (article.log_ratio, article.excess, raw.excess, paper.excess))
    )


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


def _side(excess: Tensor, clip: float = CLIP) -> Tensor:
    """-1, 0 or 1: below, inside or above the clip range."""
    return (excess > clip).int() - (excess < -clip).int()
