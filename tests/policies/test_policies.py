"""What a policy computes is what the diffusers pipeline of the same folder computes."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor

import guard_ops as go
from guard_ops.policies import PipelinePolicy
from guard_ops.policies.loading import in_dtype

PIPELINES = ("sd3", "flux", "wan", "qwen")
PROMPTS = ["a red cube", "the lazy dog, jumping"]
STEPS = 4


def sample(policy: PipelinePolicy, latents: Tensor, noise_level: float = 0.0) -> Tensor:
    """The trainer's sampler, without noise: Euler's."""
    schedule = policy.schedule(STEPS)
    steps = go.SdeSchedule(schedule.sigmas, noise_level)
    condition = policy.encode(PROMPTS)
    with torch.no_grad():
        for k, coeffs in enumerate(steps):
            timestep = schedule.timesteps[k].expand(len(latents))
            velocity = policy.velocity(latents, timestep, condition)
            latents = go.sde_step(
                velocity, latents, coeffs, noise=torch.zeros_like(latents)
            ).prev_sample
    return latents


def pipeline_of(folder: Path):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(name: str, policy: PipelinePolicy, latents: Tensor) -> dict:
    """Of the pipeline's call, for what the policy does."""
    s = policy.settings
    common = {
        "prompt": PROMPTS,
        "height": s.height,
        "width": s.width,
        "num_inference_steps": STEPS,
        "latents": latents,
        "max_sequence_length": s.text_length,
    }
    scale = s.guidance_scale
    return (
        common
        | {
            "sd3": {"guidance_scale": scale},
            "flux": {"guidance_scale": scale},
            "wan": {"guidance_scale": scale, "num_frames": s.frames},
            "qwen": {"true_cfg_scale": scale, "negative_prompt": ["", ""]},
        }[name]
    )


@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize("name", PIPELINES)
def test_sampling_without_noise_gives_the_latents_of_the_pipeline(name, guidance, load, model):
    policy = load(name, guidance_scale=guidance)
    pipe = pipeline_of(model(name))
    if name == "wan":  # UniPC of order 1, without its corrector, is Euler's method
        pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(
            pipe.scheduler.config, solver_order=1, disable_corrector=list(range(STEPS))
        )
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    kwargs = arguments(name, policy, latents)
    if name == "qwen" and guidance == 1:
        kwargs.pop("negative_prompt")
    expected = pipe(**kwargs, output_type="latent")[0]

    got = sample(policy, latents)

    # float32; the pipelines guide by two calls and without lerp. Wan's starts at 1 - 1e-6, not at 1
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", PIPELINES)
def test_pixels_are_those_of_the_pipeline(name, load, model):
    policy = load(name, decode_batch=1)
    pipe = pipeline_of(model(name))
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []
    original = pipe.vae.decode
    pipe.vae.decode = lambda *a, **k: seen.append(original(*a, **k)[0]) or (seen[-1],)
    kwargs = arguments(name, policy, latents) | {"num_inference_steps": 2}
    final: list[Tensor] = []
    kwargs["callback_on_step_end"] = lambda p, i, t, kw: final.append(kw["latents"]) or kw
    pipe(**kwargs, output_type="np" if name == "wan" else "pt")

    got = policy.decode(final[-1])

    raw = seen[0].transpose(1, 2) if name == "wan" else seen[0]
    expected = ((raw[:, :, 0] if name == "qwen" else raw) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    frames = (5,) if name == "wan" else ()
    assert got.shape == (2, *frames, 3, 32, 48)


@pytest.mark.parametrize("name", PIPELINES)
def test_weights_are_those_that_diffusers_loads(name, load, model):
    policy = load(name, dtype=torch.bfloat16)
    kind = type(policy.transformer)
    expected = kind.from_pretrained(model(name) / "transformer", **in_dtype(torch.bfloat16))

    got = policy.transformer.state_dict()

    assert {n: t.dtype for n, t in got.items()} == {
        n: t.dtype for n, t in expected.state_dict().items()
    }
    for n, tensor in expected.state_dict().items():
        assert torch.equal(got[n], tensor), n
    buffers = dict(policy.transformer.named_buffers())
    for n, tensor in expected.named_buffers():
        assert torch.equal(buffers[n], tensor), n


@pytest.mark.parametrize("name", PIPELINES)
def test_a_padded_prompt_gives_the_velocity_of_a_batch_of_its_own(name, load):
    """Fixed lengths: what a sample's neighbours are does not matter."""
    policy = load(name)
    latents = torch.randn(2, *policy.latent_shape)
    timestep = policy.schedule(STEPS).timesteps[1].expand(2)
    both = policy.encode(PROMPTS)
    together = policy.velocity(latents, timestep, both)
    for row, prompt in enumerate(PROMPTS):
        alone = policy.velocity(latents[row : row + 1], timestep[:1], policy.encode([prompt]))
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PIPELINES)
def test_schedules_begin_at_exactly_one_and_end_at_zero(name, load):
    schedule = load(name).schedule(10)

    assert schedule.sigmas[0] == 1.0
    assert schedule.sigmas[-1] == 0.0
    assert len(schedule.timesteps) == 10
    std = go.SdeSchedule(schedule.sigmas, 0.7)[0].s
    assert float(std) < 2  # where a first sigma of 1 - 1e-6 would make it 100
    assert schedule.timesteps.dtype == (torch.int64 if name == "wan" else torch.float32)


@pytest.mark.parametrize("name", ["sd3", "wan", "qwen"])
def test_gradients_of_the_conditional_velocity_only(name, load):
    """The velocity is the same; the gradient is that with the other velocity as a constant."""
    both, one = (load(name, guidance_gradient=g) for g in ("both", "conditional"))
    latents = torch.randn(2, *both.latent_shape)
    timestep = both.schedule(STEPS).timesteps[1].expand(2)
    condition, negative = both.encode(PROMPTS), both.encode([""])
    one.set_negative(negative)
    for policy in (both, one):
        policy.transformer.requires_grad_(True)

    v_both = both.velocity(latents, timestep, condition)
    v_one = one.velocity(latents, timestep, condition)

    torch.testing.assert_close(v_one, v_both, rtol=1e-5, atol=1e-5)
    parameter = one.transformer.proj_out.weight
    (got,) = torch.autograd.grad(v_one.sum(), parameter)
    with torch.no_grad():
        uncond = one.predict(
            latents, timestep, {n: t.expand(2, *t.shape[1:]) for n, t in negative.items()}
        )
    again = one.combine(uncond, one.predict(latents, timestep, condition))
    (expected,) = torch.autograd.grad(again.sum(), parameter)
    torch.testing.assert_close(got, expected)
    (full,) = torch.autograd.grad(v_both.sum(), both.transformer.proj_out.weight)
    assert not torch.allclose(got, full)


@pytest.mark.parametrize("name", PIPELINES)
def test_gradient_checkpointing_changes_no_bit(name, load):
    results = []
    for checkpointing in (False, True):
        policy = load(name, checkpointing=checkpointing)
        policy.transformer.requires_grad_(True)
        latents = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(2))
        velocity = policy.velocity(
            latents, policy.schedule(STEPS).timesteps[:1], policy.encode(PROMPTS[:1])
        )
        velocity.sum().backward()
        grads = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
        results.append((velocity.detach(), grads))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    for n, grad in results[0][1].items():
        assert torch.equal(grad, results[1][1][n]), n


def test_compiled_blocks_give_the_velocity(load, monkeypatch):
    policy = load("sd3")
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))

    policy.compile_blocks()

    assert compiled == list(policy.transformer.transformer_blocks)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"height": 40}, r"`height` is 40; it needs a multiple of 16"),
        ({"width": 16 * 40}, r"`width` is 640; this model has positions for 384"),
        ({"frames": 4}, r"`frames` is 4; it needs 1, 5, 9"),
    ],
)
def test_a_size_that_the_model_does_not_have_is_an_error(changes, message, load):
    with pytest.raises(ValueError, match=message):
        load("sd3", **changes)
