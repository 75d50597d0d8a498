"""Gradients against finite differences in float64, for every form and mode.

Balance weights, and RatioNorm's statistics under detach_stats, are constants of the gradient, so
finite differences of the loss itself would see them move. They are checked in two halves: the call
with the same weights and statistics handed in as constants has that very gradient, and that call's
gradient is its finite differences'.
"""

import itertools

import pytest
import torch
from combinations import pairs_first, values_first
from problems import FORMS, arguments, problem, relative, run, without_advantages

import guard_ops as go
from guard_ops.config import RATIO_NORMS

NORMS = tuple(RATIO_NORMS)
BALANCES = ("none", "inverse_ratio", "inverse_dt")
MODES = [
    (form, norm, balance, detach)
    for form, norm, balance in itertools.product(FORMS, NORMS, BALANCES)
    for detach in ((True, False) if RATIO_NORMS[norm].statistics else (True,))
    if not (form == "log-prob" and norm == "closed_form")  # an error: kl_old is not known
]


def small(form, **more):
    """24 elements; none of its excesses is at a clip bound (see the assertion in `constants`)."""
    given = problem(form, steps=2, batch=4, latent=(3,), drift=0.3, **more)
    return given | {"advantages": torch.tensor([1.3, -0.7, 0.9, -1.1], dtype=torch.float64)}


def constants(given, config):
    """Weights and statistics of the call as arguments, so that it has no hidden dependence."""
    out = go.guard_loss(**given, config=config)
    bounds = torch.tensor([-config.clip_low, config.clip_high]).reshape(2, 1, 1)
    assert (out.excess - bounds).abs().min() > 1e-5  # finite differences step over no kink
    assert out.metrics.clip_fraction.sum() > 0  # and both branches are taken
    more = {} if config.balance == "none" else {"step_weights": out.weights}
    if RATIO_NORMS[config.ratio_norm].statistics and config.detach_stats:
        ratio = go.log_ratio(**without_advantages(given), reduction=config.reduction)
        more["statistics"] = go.RatioStatistics(2).update(ratio.log_ratio)
    return more


def check(function, *inputs):
    """gradcheck with central differences of 1e-6: 1e-7 of truncation and rounding is left."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("form, norm, balance, detach", pairs_first(MODES))
def test_guard_loss(form, norm, balance, detach, backend):
    config = go.GuardConfig(
        norm, balance=balance, detach_stats=detach, clip_low=0.02, clip_high=0.04
    )
    given = small(form)
    more = constants(given, config)
    _, grad = run(given, config)
    _, constant_grad = run(given, config, **more)
    assert relative(grad, constant_grad) < 1e-12
    check(
        lambda v: go.guard_loss(**{**given, "model_output": v}, config=config, **more).loss,
        given["model_output"],
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"reduction": "sum"},
        {"ratio_norm": "closed_form", "reduction": "sum"},
        {"target_std": 0.05},
        {"target_std": 0.05, "detach_stats": False},
        {"adv_clip": 0.3},
        {"std_floor": 10.0},  # a degenerate step: plain GRPO's gradient
        {"std_floor": 10.0, "detach_stats": False},
    ],
    ids=str,
)
def test_other_options_of_the_objective(changes, backend):
    config = go.GuardConfig(**{"clip_low": 0.005, "clip_high": 0.01, **changes})
    given = small("velocity")
    more = constants(given, config)
    _, grad = run(given, config)
    assert relative(grad, run(given, config, **more)[1]) < 1e-12
    check(
        lambda v: go.guard_loss(**{**given, "model_output": v}, config=config, **more).loss,
        given["model_output"],
    )


@pytest.mark.parametrize("kind", ["dance_sde", "cps"])
@pytest.mark.parametrize("form", FORMS)
def test_other_kinds_of_sde(form, kind, backend):
    config = go.GuardConfig("none", clip_low=1e-3, clip_high=2e-3)
    given = small(form, kind=kind)
    constants(given, config)
    check(
        lambda v: go.guard_loss(**{**given, "model_output": v}, config=config).loss,
        given["model_output"],
    )


@pytest.mark.parametrize("form, norm", values_first(itertools.product(FORMS, NORMS)))
def test_both_branches_of_classifier_free_guidance(form, norm, backend):
    if form == "log-prob" and norm == "closed_form":
        norm = "none"
    config = go.GuardConfig(norm, detach_stats=False, clip_low=0.02, clip_high=0.04)
    given = small(form, guided=True)
    constants(given, config)
    scale = given["guidance_scale"]

    def loss(cond, uncond):
        changes = {"model_output": cond, "model_output_uncond": uncond}
        return go.guard_loss(**arguments(given, **changes), config=config).loss

    check(loss, given["model_output"], given["model_output_uncond"])
    # v = uncond + scale (cond - uncond): the chain rule, exactly.
    cond = given["model_output"].requires_grad_()
    uncond = given["model_output_uncond"].requires_grad_()
    grads = torch.autograd.grad(loss(cond, uncond), (cond, uncond))
    assert relative(grads[1] * scale, grads[0] * (1 - scale)) < 1e-12


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_kl_to_the_reference_model(norm, guided, backend):
    config = go.GuardConfig(norm, detach_stats=False, clip_low=0.02, clip_high=0.04, kl_beta=0.7)
    given = small("velocity", reference=True, guided=guided)
    more = constants(given, config)
    check(
        lambda v: go.guard_loss(**{**given, "model_output": v}, config=config, **more).loss,
        given["model_output"],
    )
    # The KL alone: with no advantage the policy loss is 0, and its gradient too.
    given["advantages"] = torch.zeros(4, dtype=torch.float64)
    out, grad = run(given, config)
    assert out.loss.item() == pytest.approx(0.7 * out.kl.mean().item(), rel=1e-12)
    assert grad.abs().max() > 0


@pytest.mark.parametrize(
    "form, guided, reduction",
    pairs_first(itertools.product(FORMS, [False, True], ["mean", "sum"])),
)
def test_log_ratio_and_its_kl(form, guided, reduction, backend):
    given = without_advantages(small(form, guided=guided))
    names = ["model_output", "model_output_uncond"][: 1 + guided]

    def both(*velocities):
        changes = dict(zip(names, velocities, strict=True))
        t = go.log_ratio(**arguments(given, **changes), reduction=reduction)
        return t.log_ratio if form == "log-prob" else tuple(t)

    check(both, *(given[name] for name in names))


def test_log_prob(backend):
    given = small("velocity")
    names = ("sample", "prev_sample", "coeffs")
    rest = {name: given[name] for name in names}
    check(lambda v: go.log_prob(v, **rest), given["model_output"])


def test_log_prob_is_that_of_the_normal_distribution(backend):
    given = small("velocity")
    x, y, coeffs = given["sample"], given["prev_sample"], given["coeffs"]
    a, b, s = (c[:, None, None] for c in (coeffs.a, coeffs.b, coeffs.s))
    normal = torch.distributions.Normal(a * x + b * given["model_output"], s)
    for reduction, expected in (
        ("mean", normal.log_prob(y).mean(-1)),
        ("sum", normal.log_prob(y).sum(-1)),
    ):
        got = go.log_prob(
            given["model_output"], sample=x, prev_sample=y, coeffs=coeffs, reduction=reduction
        )
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_log_ratio_and_kl_are_torch_distributions(backend):
    given = small("mean")
    x, y, coeffs = given["sample"], given["prev_sample"], given["coeffs"]
    a, b, s = (c[:, None, None] for c in (coeffs.a, coeffs.b, coeffs.s))
    new = torch.distributions.Normal(a * x + b * given["model_output"], s)
    old = torch.distributions.Normal(given["old_mean"], s)
    t = go.log_ratio(**without_advantages(given), reduction="sum")
    expected = (new.log_prob(y) - old.log_prob(y)).sum(-1)
    torch.testing.assert_close(t.log_ratio, expected, rtol=1e-11, atol=1e-12)
    kl = torch.distributions.kl_divergence(old, new).sum(-1)
    torch.testing.assert_close(t.kl_old, kl, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("form", FORMS)
def test_reference_is_twice_differentiable(form, norm):
    if form == "log-prob" and norm == "closed_form":
        norm = "none"
    config = go.GuardConfig(norm, detach_stats=False, clip_low=0.02, clip_high=0.04)
    given = problem(form, steps=1, batch=3, latent=(2,), drift=0.3)

    def loss(v):
        return go.guard_loss(**{**given, "model_output": v}, config=config).loss

    with go.use_backend("reference"):
        v = given["model_output"].requires_grad_()
        assert torch.autograd.gradgradcheck(loss, [v], eps=1e-6, atol=1e-6, rtol=1e-4)
