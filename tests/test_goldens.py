"""The specification's own numbers: tests/data/objective_f64.npz, every case and variant."""

import math

import pytest
import torch
from problems import largest, relative, run, truth

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


def coefficients(goldens, case):
    kind = KINDS[case.split("_")[0]]
    schedule = go.SdeSchedule(goldens[f"{case}/sigmas"], goldens[f"{case}/eta"].item(), kind)
    return schedule[goldens[f"{case}/steps"]]


def inputs(goldens, case, form, config):
    """The case's arguments in ``form``; what the file has not is derived in float64."""
    coeffs = coefficients(goldens, case)
    names = ("sample", "prev_sample", "old_model_output", "model_output", "advantages")
    given = {name: goldens[f"{case}/{name}"] for name in names}
    x, y = given["sample"], given["prev_sample"]
    a, b, s = (c.reshape(-1, *[1] * (x.ndim - 1)) for c in coeffs.table[:3])
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
    return given | {"coeffs": coeffs}


def test_the_file_holds_exactly_the_cases_that_are_tested(objective_goldens):
    assert sorted(CASES) == objective_goldens.cases
    for case in CASES:
        expected = {variant for name, variant in PAIRS if name == case}
        assert set(objective_goldens.variants(case)) == expected


@pytest.mark.parametrize("case", CASES)
def test_schedule_coefficients(case, objective_goldens):
    coeffs = coefficients(objective_goldens, case)
    for name in ("a", "b", "s", "kappa", "dt"):
        expected = objective_goldens[f"{case}/{name}"]
        torch.testing.assert_close(getattr(coeffs, name), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "case, variant, form",
    [
        (case, variant, form)
        for case, variant in PAIRS
        for form in ("velocity", "mean", "noise", "log-prob")
        if not (form == "log-prob" and variant.startswith("paper"))  # does not know kl_old
    ],
)
def test_float64_equals_the_goldens(case, variant, form, backend, objective_goldens):
    config = VARIANTS[variant]
    out, grad = run(inputs(objective_goldens, case, form, config), config)
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
        expected = objective_goldens[f"{case}/{variant}/{name}"]
        assert value.shape == expected.shape, name
        assert largest(value, expected) < EXACT, name
    expected = objective_goldens[f"{case}/{variant}/grad"]
    if variant == "article_through_stats" and "B2" in case:  # the true gradient is zero
        assert largest(grad, torch.zeros_like(grad)) < EXACT
    else:
        assert relative(grad, expected) < EXACT


# Float32 inputs carry 6e-8 each; in these forms nothing magnifies it. (The mean form's delta is a
# difference of rounded means: test_numerics.py has its own bound.)
@pytest.mark.parametrize("form", ["velocity", "noise"])
@pytest.mark.parametrize("case, variant", PAIRS)
def test_float32_is_close_to_float64_of_the_same_numbers(
    case, variant, form, fused_backend, objective_goldens
):
    config = VARIANTS[variant]
    given = {
        name: value.float() if isinstance(value, torch.Tensor) else value
        for name, value in inputs(objective_goldens, case, form, config).items()
    }
    out, grad = run(given, config)
    expected, expected_grad = truth(given, config)
    assert out.loss.dtype == out.excess.dtype == grad.dtype == torch.float32
    assert abs(out.loss.item() - expected.loss.item()) < 2e-6 * max(1, abs(expected.loss.item()))
    for got, wanted in ((out.excess, expected.excess), (out.log_ratio, expected.log_ratio)):
        # Ratios and log-ratios of the "sum" reduction are not of order 1: relative for those.
        size = 1 if config.ratio_norm == "standardize" else max(1, wanted.abs().max().item())
        assert largest(got, wanted) < 2e-6 * size
    if variant == "article_through_stats" and "B2" in case:  # true gradient 0: cancellation only
        scale = truth(given, VARIANTS["article"])[1].norm()
        assert grad.norm() < 2e-6 * scale
    else:
        assert relative(grad, expected_grad) < 2e-6
