"""The rollout's step: mean, sample, log-density, and where its noise comes from."""

import math
import re

import pytest
import torch
from problems import largest, relative, schedule

import guard_ops as go

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
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


def guided(*shape, dtype=torch.float64, scale=4.5):
    """A conditional velocity, a sample, and the guidance's two arguments."""
    v, x = pair(*shape, dtype=dtype)
    uncond = torch.randn(shape, dtype=torch.float64).to(dtype)
    return v, x, {"model_output_uncond": uncond, "guidance_scale": scale}


def combined(v, more):
    """``uncond + scale (v - uncond)`` as PyTorch rounds it in at least float32."""
    wide = torch.promote_types(v.dtype, torch.float32)
    v, uncond = v.to(wide), more["model_output_uncond"].to(wide)
    return uncond + more["guidance_scale"] * (v - uncond)


@pytest.mark.parametrize("scale", [4.5, 1.0, 0.0, -1.5])
def test_guidance_is_in_the_mean(scale, backend):
    v, x, more = guided(4, 3, 5, scale=scale)
    coeffs = schedule()[2]
    noise = torch.randn(4, 3, 5, dtype=torch.float64)
    step = go.sde_step(v, x, coeffs, noise=noise, **more)
    uncond = more["model_output_uncond"]
    mean = coeffs.a * x + coeffs.b * ((1 - scale) * uncond + scale * v)
    torch.testing.assert_close(step.mean, mean, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(step.prev_sample, mean + coeffs.s * noise, rtol=1e-13, atol=1e-14)
    square = ((step.prev_sample - step.mean) ** 2).flatten(1).mean(1)
    expected = -coeffs.kappa * square - coeffs.s.log() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(step.log_prob, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "source, dtype", [*(("noise", dtype) for dtype in DTYPES), ("seed", torch.bfloat16)]
)
def test_guidance_gives_the_bits_of_a_velocity_combined_before(source, dtype, backend):
    """Its three operators round one by one; a 16-bit pair is combined in float32."""
    v, x, more = guided(2, 3, 40, 53, dtype=dtype)  # a length that is no whole vector
    draw = torch.randn(2, 3, 40, 53) if source == "noise" else go.philox_seed(3, (2, 3))
    got = go.sde_step(v, x, schedule()[1:3], **{source: draw}, **more)
    expected = go.sde_step(combined(v, more), x, schedule()[1:3], **{source: draw})
    for name in ("prev_sample", "mean", "log_prob"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    assert got.prev_sample.dtype == dtype


@pytest.mark.parametrize(
    "form, dtype", [*(("mean", dtype) for dtype in DTYPES), ("velocity", torch.bfloat16)]
)
def test_a_guided_rollout_is_exactly_on_policy(form, dtype, backend):
    """The loss combines the pair as the step did, so the mean form's ratio is exactly 1.

    The velocity form's is where the rollout kept the combined velocity unrounded, in float32.
    """
    v, x, more = guided(3, 4, 30, 7, dtype=dtype)
    coeffs = schedule()[1:4]
    step = go.sde_step(v, x, coeffs, noise=torch.randn(3, 4, 30, 7).to(dtype), **more)
    old = {"old_mean": step.mean} if form == "mean" else {"old_model_output": combined(v, more)}
    out = go.guard_loss_and_grad(
        v, advantages=torch.randn(4), coeffs=coeffs, sample=x, prev_sample=step.prev_sample,
        **old, **more,
    )  # fmt: skip
    assert out.log_ratio.tolist() == out.excess.tolist() == [[0.0] * 4] * 3
    assert out.metrics.kl_old.tolist() == [0.0] * 3


def test_a_guided_step_reads_strides(backend):
    v, x, more = guided(4, 6, 5)
    noise = torch.randn(4, 6, 5, dtype=torch.float64)
    expected = go.sde_step(v, x, schedule()[1], noise=noise, **more)
    apart = torch.zeros(8, 6, 5, dtype=torch.float64)[::2]  # a stride over the batch of its own
    apart.copy_(more["model_output_uncond"])
    turned = apart.transpose(1, 2).contiguous().transpose(1, 2)  # latents that are not dense
    for uncond in (apart, turned):
        got = go.sde_step(
            v, x, schedule()[1], noise=noise, guidance_scale=4.5, model_output_uncond=uncond
        )
        assert torch.equal(got.mean, expected.mean)
        assert torch.equal(got.prev_sample, expected.prev_sample)


def test_a_mixed_pair_is_combined_in_the_wider_dtype(backend):
    v, x, more = guided(4, 30, dtype=torch.float32)
    more["model_output_uncond"] = more["model_output_uncond"].double()
    step = go.sde_step(v, x, schedule()[1], **more)
    assert step.mean.dtype == step.noise.dtype == torch.float64
    a, b = schedule()[1].a, schedule()[1].b
    mean = a * x.double() + b * combined(v.double(), more)
    torch.testing.assert_close(step.mean, mean, rtol=1e-14, atol=1e-15)


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
        (
            {"guidance_scale": 2.0},
            ValueError,
            "`model_output_uncond` is missing: classifier-free guidance needs both",
        ),
        (
            {"model_output_uncond": zeros(4, 6, 5)},
            ValueError,
            "`guidance_scale` is missing: classifier-free guidance needs both",
        ),
        (
            {"model_output_uncond": zeros(4, 5, 6), "guidance_scale": 2.0},
            ValueError,
            "`model_output_uncond` has shape (4, 5, 6) but `model_output` (4, 6, 5)",
        ),
        (
            {"model_output_uncond": [0.0], "guidance_scale": 2.0},
            TypeError,
            "`model_output_uncond` is a list; it needs a tensor",
        ),
        (
            {"model_output_uncond": zeros(4, 6, 5), "guidance_scale": math.nan},
            ValueError,
            "`guidance_scale` is nan",
        ),
        (
            {"model_output_uncond": zeros(4, 6, 5), "guidance_scale": "4.5"},
            TypeError,
            "`guidance_scale` is '4.5'",
        ),
        (
            {"model_output_uncond": zeros(4, 6, 5, requires_grad=True), "guidance_scale": 2.0},
            ValueError,
            "`model_output_uncond` requires grad: sde_step is the rollout",
        ),
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
