"""The rollout's step: mean, sample, log-density, and where its noise comes from."""

import math
import re

import pytest
import torch
from problems import largest, relative, schedule

import guard_ops as go

KINDS = ["flow_sde", "dance_sde", "wan_sde", "cps"]


def pair(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype), torch.randn(shape).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_mean_sample_and_density(kind, backend):
    v, x = pair(4, 3, 5)
    coeffs = schedule(kind)[2]
    noise = torch.randn(4, 3, 5, dtype=torch.float64)
    step = go.sde_step(v, x, coeffs, noise=noise)
    a, b, s, kappa = coeffs.a, coeffs.b, coeffs.s, coeffs.kappa
    mean = a * x + b * v
    torch.testing.assert_close(step.mean, mean, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(step.prev_sample, mean + s * noise, rtol=1e-14, atol=1e-15)
    assert step.noise is noise
    square = ((step.prev_sample - mean) ** 2).flatten(1)
    constants = 0 if kind == "cps" else math.log(s) + 0.5 * math.log(2 * math.pi)
    expected = -kappa * square.mean(1) - constants
    torch.testing.assert_close(step.log_prob, expected, rtol=1e-12, atol=1e-13)
    total = go.sde_step(v, x, coeffs, noise=noise, reduction="sum")
    torch.testing.assert_close(total.log_prob, 15 * expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, backend):
    """The sample keeps its dtype, the mean is float32, the density that of the rounded sample."""
    v, x = pair(4, 40, 50, dtype=dtype)
    coeffs = schedule()[2]
    noise = torch.randn(4, 40, 50).to(dtype)
    step = go.sde_step(v, x, coeffs, noise=noise)
    assert step.prev_sample.dtype == dtype
    assert step.mean.dtype == step.log_prob.dtype == torch.float32
    a, b, s, kappa = coeffs.a, coeffs.b, coeffs.s, coeffs.kappa
    mean = a * x.double() + b * v.double()
    assert largest(step.mean, mean) < 1e-6
    rounding = {torch.float32: 2e-7, torch.bfloat16: 2e-3, torch.float16: 3e-4}[dtype]
    assert relative(step.prev_sample, mean + s * noise.double()) < rounding
    square = ((step.prev_sample.double() - mean) ** 2).flatten(1).mean(1)
    expected = -kappa * square - s.log() - 0.5 * math.log(2 * math.pi)
    assert largest(step.log_prob, expected) < 2e-6


def test_it_samples_the_policy_it_says(backend):
    """2e5 elements: mean, spread and log-density of the noise within their standard errors."""
    v, x = pair(4, 50_000)
    coeffs = schedule()[1]
    step = go.sde_step(v, x, coeffs, generator=torch.Generator().manual_seed(3))
    z = (step.prev_sample - step.mean) / coeffs.s
    assert z.mean().abs() < 4 / math.sqrt(2e5)
    assert (z.std() - 1).abs() < 4 / math.sqrt(4e5)
    entropy = math.log(coeffs.s) + 0.5 * math.log(2 * math.pi * math.e)
    assert (step.log_prob.mean() + entropy).abs() < 4 * math.sqrt(0.5 / 2e5)


def test_where_the_noise_comes_from(backend):
    v, x = pair(4, 30)
    coeffs = schedule()[1]
    torch.manual_seed(5)
    default = go.sde_step(v, x, coeffs)
    torch.manual_seed(5)
    assert torch.equal(go.sde_step(v, x, coeffs).prev_sample, default.prev_sample)
    assert not torch.equal(go.sde_step(v, x, coeffs).prev_sample, default.prev_sample)
    again = go.sde_step(v, x, coeffs, noise=default.noise)
    assert torch.equal(again.prev_sample, default.prev_sample)
    generated = [
        go.sde_step(v, x, coeffs, generator=torch.Generator().manual_seed(7)) for _ in range(2)
    ]
    assert torch.equal(generated[0].noise, generated[1].noise)


def test_many_steps_at_once_are_each_step(backend):
    v, x = pair(3, 4, 6, 5)
    noise = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    whole = go.sde_step(v, x, schedule()[1:4], noise=noise)
    for k in range(3):
        one = go.sde_step(v[k], x[k], schedule()[1 + k], noise=noise[k])
        assert torch.equal(whole.prev_sample[k], one.prev_sample)
        assert torch.equal(whole.mean[k], one.mean)
        assert torch.equal(whole.log_prob[k], one.log_prob)
    mixed = schedule()[torch.tensor([[1, 2, 3, 1]] * 3)]
    got = go.sde_step(v, x, mixed, noise=noise)
    assert torch.equal(got.mean[1, 1], whole.mean[1, 1])
    assert torch.equal(got.mean[0, 0], whole.mean[0, 0])


def test_a_deterministic_step_samples_its_mean(backend):
    v, x = pair(4, 30)
    ode = go.SdeSchedule([0.9, 0.5, 0.0], noise_level=0.0)[0]
    step = go.sde_step(v, x, ode)
    torch.testing.assert_close(step.prev_sample, x - 0.4 * v, rtol=1e-14, atol=1e-15)
    assert torch.equal(step.prev_sample, step.mean)
    assert step.log_prob.tolist() == [math.inf] * 4
    last = go.sde_step(v, x, schedule("cps")[-1])
    assert torch.equal(last.prev_sample, last.mean)
    assert last.log_prob.tolist() == [0.0] * 4  # cps drops the constants


def test_layouts_and_inputs(backend):
    """Transposed latents are read right, and neither input is written to."""
    v, x = pair(4, 6, 5)
    noise = torch.randn(4, 6, 5, dtype=torch.float64)
    before = v.clone(), x.clone(), noise.clone()
    expected = go.sde_step(v, x, schedule()[1], noise=noise)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (v, x, noise)]
    got = go.sde_step(turned[0], turned[1], schedule()[1], noise=turned[2])
    assert torch.equal(got.prev_sample, expected.prev_sample)
    assert torch.equal(got.log_prob, expected.log_prob)
    assert all(torch.equal(a, b) for a, b in zip(before, (v, x, noise), strict=True))


def test_under_no_grad_a_network_in_training_mode_may_be_rolled_out(backend):
    v, x = pair(4, 6)
    with torch.no_grad():
        step = go.sde_step(v.requires_grad_(), x, schedule()[1])
    assert not step.prev_sample.requires_grad
    assert not step.mean.requires_grad


def zeros(*shape, **options):
    return torch.zeros(*shape, **{"dtype": torch.float64, **options})


@pytest.mark.parametrize(
    "changes, exception, message",
    [
        ({"sample": zeros(4, 5, 6)}, ValueError, "`sample` has shape (4, 5, 6) but `model_output`"),
        ({"sample": [0.0]}, TypeError, "`sample` is a list; it needs a tensor"),
        ({"model_output": zeros(4)}, ValueError, "`model_output` has shape (4,); with `coeffs` of"),
        ({"coeffs": schedule()}, TypeError, "`coeffs` is a SdeSchedule; it needs StepCoefficients"),
        (
            {"noise": zeros(4, 6, 5), "seed": 1},
            ValueError,
            "the noise is given by noise and seed; it needs at most one",
        ),
        (
            {"noise": zeros(4, 6, 5), "generator": torch.Generator()},
            ValueError,
            "the noise is given by generator and noise; it needs at most one",
        ),
        ({"noise": zeros(4)}, ValueError, "`noise` has shape (4,) but `model_output` (4, 6, 5)"),
        ({"noise": zeros(4, 6, 5, dtype=torch.int8)}, TypeError, "`noise` has dtype torch.int8"),
        ({"seed": 1.5}, TypeError, "`seed` is 1.5 (float); it needs the rollout's seeds"),
        ({"generator": 0}, TypeError, "`generator` is a int; it needs a torch.Generator"),
        ({"reduction": "avg"}, ValueError, "`reduction` is 'avg'; it needs one of mean, sum"),
        (
            {"model_output": zeros(4, 6, 5, requires_grad=True)},
            ValueError,
            "`model_output` requires grad: sde_step is the rollout and has no gradient; call it "
            "under torch.no_grad()",
        ),
        ({"sample": zeros(4, 6, 5, requires_grad=True)}, ValueError, "`sample` requires grad"),
    ],
    ids=lambda x: str(x)[:50] if isinstance(x, str) else "",
)
def test_bad_arguments_of_sde_step(changes, exception, message):
    given = {
        "model_output": zeros(4, 6, 5),
        "sample": zeros(4, 6, 5),
        "coeffs": schedule()[1],
    }
    with pytest.raises(exception, match=re.escape(message)):
        go.sde_step(**given | changes)
