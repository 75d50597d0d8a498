"""The cases of tests/data/objective_f64.npz as arguments of ``guard_loss``, on any device."""

from __future__ import annotations

import math
from typing import Any

import torch
from problems import Problem, largest, relative, truth
from torch import Tensor

import guard_ops as go

KINDS = {"flow": "flow_sde", "dance": "dance_sde", "cps": "cps"}
VARIANTS = {
    "plain": go.GuardConfig("none", clip_low=1e-4, clip_high=1e-4),
    "plain_asym_sum": go.GuardConfig(
        "none", clip_low=0.1, clip_high=0.3, adv_clip=1.0, reduction="sum"
    ),
    "article": go.GuardConfig.article(),
    "article_through_stats": go.GuardConfig.article(detach_stats=False),
    "article_target": go.GuardConfig(target_std=0.05, clip_low=0.02, clip_high=0.04),
    "article_kl": go.GuardConfig.article(kl_beta=0.04),
    "paper": go.GuardConfig.paper(),
    "paper_wide": go.GuardConfig.paper(clip_low=0.01, clip_high=0.02),
}
EXACT = 1e-9  # the goldens are exact to about 1e-12; what is left is float64 sums in another order
CASES = [
    f"{kind}_{shape}_drift{drift}"
    for kind in ("flow_sde", "dance_sde", "cps")
    for shape in ("17x3_K4_B8", "257_K2_B2", "2x3x4x5_K1_B6", "4x6x6_K3_B5")
    for drift in ("0.001", "0.3")
]
PAIRS = [  # closed_form needs a Gaussian kappa, which cps has not
    (case, variant)
    for case in CASES
    for variant in VARIANTS
    if not (case.startswith("cps") and variant.startswith("paper"))
]


def coefficients(goldens: Any, case: str) -> go.StepCoefficients:
    kind = KINDS[case.split("_")[0]]
    schedule = go.SdeSchedule(goldens[f"{case}/sigmas"], goldens[f"{case}/eta"].item(), kind)
    return schedule[goldens[f"{case}/steps"]]


def inputs(goldens: Any, case: str, form: str, config: go.GuardConfig) -> Problem:
    """The case's arguments in ``form``; what the file has not is derived in float64."""
    coeffs = coefficients(goldens, case)
    names = ("sample", "prev_sample", "old_model_output", "model_output", "advantages")
    given = {name: goldens[f"{case}/{name}"] for name in names}
    x, y = given["sample"], given["prev_sample"]
    a, b, s = (c.reshape(-1, *[1] * (x.ndim - 1)) for c in (coeffs.a, coeffs.b, coeffs.s))
    mean = a * x + b * given["old_model_output"]
    if form in ("mean", "log-prob", "noise"):
        del given["old_model_output"]
    if form == "mean":
        given["old_mean"] = mean
    if form == "noise":
        del given["sample"], given["prev_sample"]
        given["old_model_output"] = goldens[f"{case}/old_model_output"]
        given["noise"] = (y - mean) / s
    if form == "log-prob":
        per_element = -coeffs.kappa.reshape(s.shape) * (y - mean) ** 2
        if coeffs.gaussian:
            per_element = per_element - s.log() - 0.5 * math.log(2 * math.pi)
        flat = per_element.flatten(2)
        given["old_log_prob"] = flat.sum(-1) if config.reduction == "sum" else flat.mean(-1)
    if config.kl_beta:
        given["ref_model_output"] = goldens[f"{case}/ref_model_output"]
    if config.balance == "inverse_ratio" and len(x) == 1:  # a call of one step has to be told this
        given["step_weights"] = torch.ones(x.shape[:2], dtype=torch.float64)
    return given | {"coeffs": coeffs}


def check_exact(goldens: Any, case: str, variant: str, out: Any, grad: Tensor) -> None:
    """What a float64 backend returned, on whatever device, is what the file says."""
    metrics = out.metrics
    got = {
        "loss": out.loss,
        "log_ratio": out.log_ratio,
        "ratio_hat_minus_one": out.excess,
        "ratio_hat": 1 + out.excess,
        "weights": out.weights,
        "kl": out.kl.mean(),
        "ratio_mean": 1 + metrics.ratio_bias,
        "ratio_std": metrics.ratio_std,
        "ratio_hat_mean": 1 + metrics.ratio_hat_bias,
        "ratio_hat_std": metrics.ratio_hat_std,
        "clip_fraction": metrics.clip_fraction,
    }
    for name, value in got.items():
        expected = goldens[f"{case}/{variant}/{name}"]
        assert value.shape == expected.shape, name
        assert largest(value.cpu(), expected) < EXACT, name
    grad, expected = grad.cpu(), goldens[f"{case}/{variant}/grad"]
    if no_gradient(case, variant):
        assert largest(grad, torch.zeros_like(grad)) < EXACT
    else:
        assert relative(grad, expected) < EXACT


def rounded(given: Problem) -> Problem:
    """The arguments in float32."""
    return {
        name: value.float() if isinstance(value, Tensor) else value for name, value in given.items()
    }


def check_float32(given: Problem, case: str, variant: str, out: Any, grad: Tensor) -> None:
    """What came of the :func:`rounded` arguments is float64's of the same, within 2e-6.

    Against the file's own numbers nothing could be said: rounding v and v_old alone moves delta by
    6e-5 relative at a drift of 1e-3.
    """
    config = VARIANTS[variant]
    expected, expected_grad = truth(given, config)
    assert out.loss.dtype == out.excess.dtype == grad.dtype == torch.float32
    assert abs(out.loss.item() - expected.loss.item()) < 2e-6 * max(1, abs(expected.loss.item()))
    for got, wanted in ((out.excess, expected.excess), (out.log_ratio, expected.log_ratio)):
        # Ratios and log-ratios of the "sum" reduction are not of order 1: relative for those.
        size = 1 if config.ratio_norm == "standardize" else max(1, wanted.abs().max().item())
        assert largest(got.cpu(), wanted) < 2e-6 * size
    if no_gradient(case, variant):  # cancellation only
        scale = truth(given, VARIANTS["article"])[1].norm()
        assert grad.norm().item() < 2e-6 * scale
    else:
        assert relative(grad.cpu(), expected_grad) < 2e-6


def no_gradient(case: str, variant: str) -> bool:
    """Whether the true gradient is zero: of two samples, through their own statistics."""
    return variant == "article_through_stats" and "B2" in case
