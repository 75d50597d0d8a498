"""Precision: what survives float32, what is exactly 0 on policy, what 16-bit inputs cost."""

import itertools
import math

import pytest
import torch
from combinations import pairs_first
from problems import (
    EXACT_ON_POLICY,
    FORMS,
    largest,
    problem,
    relative,
    run,
    schedule,
    truth,
    without_advantages,
)

import guard_ops as go

NARROW = (torch.float32, torch.bfloat16, torch.float16)


def plain_standardized(given, old_model_output):
    """``r_hat - 1`` as trainers compute it: the difference of two log-probs, then exp."""
    x, y = given["sample"], given["prev_sample"]
    coeffs = given["coeffs"]
    a, b, s = (c.item() for c in (coeffs.a, coeffs.b, coeffs.s))

    def log_prob(v):
        per_element = -((y - (a * x + b * v)) ** 2) / (2 * s**2) - math.log(s)
        return (per_element - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)

    ratio = torch.exp(log_prob(given["model_output"]) - log_prob(old_model_output))
    return (ratio - ratio.mean()) / ratio.std(correction=0)


# The bounds are issue 2's. Only the mean form, whose stored mean is itself rounded to float32, is
# more than rounding away from float64.
@pytest.mark.parametrize(
    "form, bound",
    [
        ("velocity", 1e-5),
        # seconds each, and smaller in the next test
        pytest.param("mean", 2e-2, marks=pytest.mark.slow_suite),
        pytest.param("noise", 1e-5, marks=pytest.mark.slow_suite),
        pytest.param("seeded", 1e-5, marks=pytest.mark.slow_suite),
    ],
)
def test_excess_survives_float32_at_a_drift_that_plain_pytorch_loses(form, bound, fused_backend):
    size = {"steps": None, "batch": 32, "latent": (4096, 64), "drift": 1e-4}
    given = problem(form, dtype=torch.float32, **size)
    out, grad = run(given, go.GuardConfig())
    expected, expected_grad = truth(given, go.GuardConfig())
    assert out.excess.dtype == torch.float32
    assert largest(out.excess, expected.excess) < bound
    assert relative(grad, expected_grad) < bound
    inside = (expected.excess.abs() - 0.2).abs() > bound
    clipped = (out.excess.abs() > 0.2) == (expected.excess.abs() > 0.2)
    assert clipped[inside].all()
    if form in ("velocity", "mean"):
        other = given if form == "velocity" else problem("velocity", dtype=torch.float32, **size)
        old = other["old_model_output"]
        plain = plain_standardized(given, old)
        assert largest(plain, expected.excess) > 0.5  # measured 2.1
        assert ((plain.abs() > 0.2) != (expected.excess.abs() > 0.2)).sum() > 5  # of 32


@pytest.mark.parametrize("form", ["velocity", "noise", "seeded"])
def test_delta_is_a_difference_of_velocities_on_every_backend(form, backend):
    """Subtracting two float32 means instead misses the bound by far."""
    given = problem(form, steps=2, batch=8, latent=(64, 64), dtype=torch.float32, drift=1e-4)
    out, _ = run(given, go.GuardConfig())
    expected, _ = truth(given, go.GuardConfig())
    assert largest(out.excess, expected.excess) < 1e-5


@pytest.mark.parametrize(
    "form, dtype, norm",
    pairs_first(
        itertools.product(
            EXACT_ON_POLICY,
            [torch.float64, *NARROW],
            ["none", "standardize", "closed_form"],
        )
    ),
)
def test_on_policy_is_exactly_on_policy(form, dtype, norm, backend):
    given = problem(form, latent=(41, 33), dtype=dtype, drift=0)
    config = go.GuardConfig(norm, balance="inverse_ratio")
    out, grad = run(given, config)
    zero = torch.zeros_like(out.excess)
    assert torch.equal(out.log_ratio, zero)
    assert torch.equal(out.excess, zero)
    assert torch.equal(out.weights, zero + 1 / 3)
    for name in ("ratio_bias", "ratio_std", "ratio_hat_bias", "ratio_hat_std", "kl_old"):
        assert torch.equal(getattr(out.metrics, name), zero[:, 0]), name
    assert torch.equal(out.metrics.clip_fraction, zero[:, 0])
    ratio = go.log_ratio(**without_advantages(given))
    assert torch.equal(ratio.log_ratio, zero)
    assert torch.equal(ratio.kl_old, zero)
    # loss = -mean(A), and its gradient is plain GRPO's, neither zero nor an explosion.
    assert out.loss.item() == pytest.approx(-given["advantages"].double().mean().item(), abs=1e-6)
    _, expected_grad = truth(given, go.GuardConfig(norm, balance="inverse_ratio"))
    assert grad.abs().max() > 0
    assert torch.isfinite(grad).all()
    if form != "mean":  # there truth's mean in float64 is not the stored float32 one
        # One rounding of each element to bf16 or, of elements near 1e-6, to fp16's subnormals.
        rounding = {torch.bfloat16: 2e-3, torch.float16: 2e-3}.get(dtype, 2e-6)
        assert relative(grad, expected_grad) < rounding


def test_the_first_update_of_a_guided_rollout_is_on_policy(backend):
    """Guidance is rounded like the three PyTorch operators, so the combined velocity is equal."""
    for dtype in (torch.float64, torch.float32):
        given = problem("noise", latent=(13, 11), dtype=dtype, guided=True)
        v, uncond, scale = (
            given[k] for k in ("model_output", "model_output_uncond", "guidance_scale")
        )
        out, _ = run(given | {"old_model_output": uncond + scale * (v - uncond)})
        assert torch.equal(out.log_ratio, torch.zeros_like(out.log_ratio))


NUMELS = (1, 7, 127, 1023, 1025, 4097, 70000)


def of_size(form, numel):
    """A problem in float32, and an objective that its form has."""
    norm = "none" if form == "log-prob" else "closed_form"
    given = problem(form, steps=2, batch=3, latent=(numel,), dtype=torch.float32, drift=0.5)
    return given, go.GuardConfig(norm, clip_low=0.2, clip_high=0.2)


# A float32 operand is 6e-8 from the real one; velocities of order 1 move e and delta by that, and
# sums of D terms do not magnify it.
@pytest.mark.parametrize("numel", NUMELS)
@pytest.mark.parametrize("form", FORMS)
def test_every_size_of_latent(form, numel, fused_backend):
    given, config = of_size(form, numel)
    out, grad = run(given, config)
    expected, expected_grad = truth(given, config)
    size = max(1.0, expected.log_ratio.abs().max().item())
    assert largest(out.log_ratio, expected.log_ratio) < 5e-6 * size
    assert relative(grad, expected_grad) < 5e-6 * size  # the ratio multiplies the gradient


@pytest.mark.parametrize("numel", NUMELS)
@pytest.mark.parametrize("form", FORMS)
def test_every_size_of_latent_in_float64(form, numel, fused_backend):
    given, config = of_size(form, numel)
    expected, expected_grad = truth(given, config)
    size = max(1.0, expected.log_ratio.abs().max().item())
    wide, wide_grad = run({**given, "model_output": given["model_output"].double()}, config)
    assert largest(wide.log_ratio, expected.log_ratio) < 1e-12 * size
    assert relative(wide_grad, expected_grad) < 1e-12 * size


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("numel", [1, 5, 1030])
def test_float64_backends_agree_at_odd_sizes(form, numel, fused_backend):
    given = problem(form, steps=2, batch=3, latent=(numel,), drift=0.3, reference=True)
    config = go.GuardConfig("none", clip_low=0.2, clip_high=0.3, kl_beta=0.1)
    out, grad = run(given, config)
    expected, expected_grad = truth(given, config)
    assert relative(out.log_ratio, expected.log_ratio) < 1e-12
    assert relative(out.kl, expected.kl) < 1e-12
    assert relative(grad, expected_grad) < 1e-12


MIXTURES = [
    # model_output, sample, prev_sample, old_model_output, old_mean, noise
    (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.float16, torch.float16, torch.float16, torch.float16, torch.float32, torch.float16),
    (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.float16, torch.float16, torch.float32, torch.bfloat16),
    (torch.float16, torch.float32, torch.bfloat16, torch.float32, torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.float64, torch.float32, torch.bfloat16, torch.float32, torch.float64),
]


@pytest.mark.parametrize("dtypes", MIXTURES, ids=lambda d: "-".join(str(x)[6:] for x in d))
@pytest.mark.parametrize("form", FORMS)
def test_mixtures_of_dtypes_are_float32_arithmetic_on_the_rounded_inputs(form, dtypes, backend):
    names = ("model_output", "sample", "prev_sample", "old_model_output", "old_mean", "noise")
    given = problem(form, latent=(19, 7), dtype=torch.float32, drift=0.5)
    for name, dtype in zip(names, dtypes, strict=True):
        if name in given:
            given[name] = given[name].to(dtype)
    config = go.GuardConfig("none", clip_low=0.2, clip_high=0.2)
    out, grad = run(given, config)
    expected, expected_grad = truth(given, config)
    present = [given[n].dtype for n in names if n in given]
    wide = torch.float64 if torch.float64 in present else torch.float32
    assert out.loss.dtype == out.log_ratio.dtype == out.metrics.ratio_std.dtype == wide
    assert grad.dtype == dtypes[0]
    assert largest(out.log_ratio, expected.log_ratio) < 1e-5
    # The gradient is rounded once to its own dtype: half of 2^-8, 2^-11, 2^-24 of each element.
    rounding = {torch.bfloat16: 2e-3, torch.float16: 5e-4, torch.float32: 1e-5}[dtypes[0]]
    assert relative(grad, expected_grad) < rounding


def test_float32_inputs_in_a_float64_call_are_computed_in_float64(backend):
    given = problem("noise", dtype=torch.float32, drift=0.3)
    given["noise"] = given["noise"].double()
    out, _ = run(given)
    expected, _ = truth(given)
    assert out.log_ratio.dtype == torch.float64
    assert relative(out.log_ratio, expected.log_ratio) < 1e-12


def near_the_bound(bound, offsets, closed_form):
    """One step whose excesses are ``bound (1 + offset)``: the velocity moves along the noise.

    ``v = t s eps / b`` from ``v_old = 0`` gives log r = (t - t^2 / 2) mean(eps^2), each number to
    float32's relative precision, which is what a velocity difference has in memory.
    """
    coeffs = schedule()[2]
    b, s = coeffs.b.item(), coeffs.s.item()
    noise = torch.randn(len(offsets), 64, 64, dtype=torch.float64)
    square = (noise**2).mean((1, 2))
    target = torch.log1p(bound * (1 + torch.tensor(offsets, dtype=torch.float64)))
    plain, scaled = 1 - torch.sqrt(1 - 2 * target / square), target / (s * square)
    t = scaled if closed_form else plain  # closed form: log r_hat = s t mean(eps^2)
    v = t.reshape(-1, 1, 1) * s * noise / b
    return {
        "model_output": v.float(),
        "old_model_output": torch.zeros(noise.shape),
        "noise": noise.float(),
        "coeffs": coeffs,
    }


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("norm", ["none", "closed_form"])
def test_a_clip_of_2e_6_is_decided_correctly_in_float32(norm, sign, backend):
    """The published bound is 17 roundings of a ratio near 1; here 1e-5 of the bound decides."""
    offsets = [-0.05, -1e-3, -1e-5, 1e-5, 1e-3, 0.05]
    given = near_the_bound(sign * 2e-6, offsets, norm == "closed_form")
    given["advantages"] = torch.full((6,), float(sign))
    config = go.GuardConfig(norm, clip_low=2e-6, clip_high=2e-6)
    out, grad = run(given, config)
    expected = sign * 2e-6 * (1 + torch.tensor(offsets, dtype=torch.float64))
    torch.testing.assert_close(out.excess.double(), expected, rtol=2e-6, atol=0)
    clipped = [False, False, False, True, True, True]
    assert [bool((g == 0).all()) for g in grad] == clipped
    assert out.metrics.clip_fraction == 0.5
    assert out.metrics.clip_fraction_high == (0.5 if sign == 1 else 0)
    assert out.metrics.clip_fraction_low == (0.5 if sign == -1 else 0)
    # A float32 ratio cannot tell these six apart.
    ratio = 1 + out.excess
    assert len(set((ratio - 1).tolist())) < 5


def test_metrics_keep_the_digits_that_a_ratio_near_1_loses(fused_backend):
    given = problem("noise", dtype=torch.float32, latent=(64, 64), drift=1e-5)
    out, _ = run(given, go.GuardConfig.flow_grpo())
    expected, _ = truth(given, go.GuardConfig.flow_grpo())
    assert out.metrics.ratio_std.max() < 1e-6  # eight float32 steps of a ratio near 1
    torch.testing.assert_close(
        out.metrics.ratio_std.double(), expected.metrics.ratio_std, rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        out.metrics.ratio_bias.double(), expected.metrics.ratio_bias, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("form", ["mean", "velocity"])
def test_rounded_samples_do_not_break_the_form(form, backend):
    """bf16 trajectories: e is that of the stored, rounded sample, as the true density's is."""
    given = problem(form, latent=(41, 33), dtype=torch.bfloat16, drift=0.5)
    out, _ = run(given, go.GuardConfig.flow_grpo())
    expected, _ = truth(given, go.GuardConfig.flow_grpo())
    assert largest(out.log_ratio, expected.log_ratio) < 1e-6
