"""``FlowMatchSdeScheduler`` passes the checks that diffusers applies to its own schedulers."""

from __future__ import annotations

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="the `diffusers` extra is not installed")

import guard_ops as go  # noqa: E402
from guard_ops.integrations.diffusers import FlowMatchSdeScheduler  # noqa: E402


def made(steps=8, **kwargs):
    scheduler = FlowMatchSdeScheduler(**{"shift": 3.0, **kwargs})
    scheduler.set_timesteps(steps)
    return scheduler


def latents(batch=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 4, 8, 8, generator=generator) for _ in range(3)]


def test_configuration_round_trip(tmp_path):
    scheduler = made(noise_level=0.4, sde_kind="cps", base_shift=0.6)
    scheduler.save_pretrained(tmp_path)
    loaded = FlowMatchSdeScheduler.from_pretrained(tmp_path)
    assert dict(loaded.config) == dict(scheduler.config)
    assert (loaded.noise_level, loaded.sde_kind) == (0.4, "cps")
    again = FlowMatchSdeScheduler.from_config(scheduler.config)
    assert dict(again.config) == dict(scheduler.config)


def test_takes_the_configuration_of_diffusers_own():
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0, base_shift=0.7)
    scheduler = FlowMatchSdeScheduler.from_config(euler.config)
    scheduler.set_timesteps(6)
    euler.set_timesteps(6)
    assert torch.equal(scheduler.sigmas, euler.sigmas)
    assert torch.equal(scheduler.timesteps, euler.timesteps)


def test_takes_the_flow_shift_of_wans_unipc():
    unipc = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    scheduler = FlowMatchSdeScheduler.from_config(unipc.config)
    assert scheduler.config.shift == 5.0
    assert FlowMatchSdeScheduler.from_config(unipc.config, shift=2.0).config.shift == 2.0
    expected = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    for each in (scheduler, expected):
        each.set_timesteps(6)
    assert torch.equal(scheduler.sigmas, expected.sigmas)


def test_without_noise_it_is_the_euler_scheduler():
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_timesteps(8)
    scheduler, (v, x, _) = made(noise_level=0.0), latents()
    for t in euler.timesteps:
        expected = euler.step(v, t, x).prev_sample
        found = scheduler.step(v, t, x)
        torch.testing.assert_close(found.prev_sample, expected, rtol=1e-5, atol=1e-6)
        assert found.log_prob is None
        x = expected


@pytest.mark.parametrize("steps", [2, 10, 50])
@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "wan_sde", "cps"])
def test_full_loop(steps, kind):
    scheduler = made(steps, sde_kind=kind, noise_level=0.3)
    x = torch.randn(2, 4, 8, 8)
    for i, t in enumerate(scheduler.timesteps):
        assert scheduler.step_index == (i if i else None)
        x = scheduler.step(0.1 * x, t, x, generator=torch.Generator().manual_seed(i)).prev_sample
    assert x.isfinite().all()
    assert scheduler.step_index == steps


def test_the_step_is_sde_step():
    scheduler, (v, x, noise) = made(), latents()
    scheduler.set_begin_index(2)
    generator = torch.Generator().manual_seed(4)
    found = scheduler.step(v, scheduler.timesteps[2], x, generator=generator)
    draw = torch.randn(v.shape, generator=torch.Generator().manual_seed(4))
    expected = go.sde_step(v, x, scheduler.schedule[2], noise=draw)
    torch.testing.assert_close(found.prev_sample, expected.prev_sample)
    torch.testing.assert_close(found.log_prob, expected.log_prob)
    torch.testing.assert_close(found.prev_sample_mean, expected.mean)
    assert not torch.equal(noise, draw)


def test_a_timestep_for_each_sample():
    scheduler, (v, x, y) = made(), latents()
    at = scheduler.timesteps[[0, 3, 6]]
    together = scheduler.step(v, at, x, prev_sample=y)
    assert scheduler.step_index is None
    for i, k in enumerate((0, 3, 6)):
        row = slice(i, i + 1)
        alone = go.log_prob(v[row], sample=x[row], prev_sample=y[row], coeffs=scheduler.schedule[k])
        torch.testing.assert_close(together.log_prob[row], alone)


def test_log_prob_of_a_taken_step_is_differentiable():
    scheduler, (v, x, y) = made(), latents()
    v.requires_grad_()
    out = scheduler.step(v, scheduler.timesteps[3], x, prev_sample=y)
    (grad,) = torch.autograd.grad(out.log_prob.sum(), v)
    assert grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_of_the_model_output_is_kept(dtype):
    scheduler, (v, x, _) = made(), latents()
    out = scheduler.step(v.to(dtype), scheduler.timesteps[1], x.to(dtype))
    assert out.prev_sample.dtype == dtype
    assert out.log_prob.dtype == out.prev_sample_mean.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
def test_log_prob_is_that_of_the_sample_returned(kind, dtype):
    """bf16's rounding moves it by 1e-4, which is a clip range."""
    scheduler, (v, x, _) = made(sde_kind=kind), latents()
    out = scheduler.step(v.to(dtype), scheduler.timesteps[1], x)
    again = scheduler.step(
        v.to(dtype), scheduler.timesteps[[1, 1, 1]], x, prev_sample=out.prev_sample
    )
    assert torch.equal(out.log_prob, again.log_prob)


def test_device_moves_with_set_timesteps():
    scheduler = FlowMatchSdeScheduler()
    scheduler.set_timesteps(4, device="meta")
    assert scheduler.sigmas.device.type == scheduler.timesteps.device.type == "meta"
    scheduler.set_timesteps(4, device="cpu")
    assert scheduler.schedule.device == torch.device("cpu")


def test_tuple_output():
    scheduler, (v, x, _) = made(), latents()
    first = scheduler.step(v, scheduler.timesteps[0], x, return_dict=False)
    assert len(first) == 3


def test_seeds_repeat():
    scheduler, (v, x, _) = made(), latents()
    runs = []
    for _ in range(2):
        scheduler.set_timesteps(8)
        generator = torch.Generator().manual_seed(1)
        runs.append(scheduler.step(v, scheduler.timesteps[0], x, generator=generator).prev_sample)
    assert torch.equal(*runs)


def test_bad_input_names_the_argument():
    scheduler, (v, x, _) = made(), latents()
    with pytest.raises(ValueError, match="`timestep` is an integer"):
        scheduler.step(v, 3, x)
    with pytest.raises(ValueError, match=r"`timestep` has 0\.5"):
        scheduler.step(v, torch.full((3,), 0.5), x)
    with pytest.raises(ValueError, match="per_token_timesteps"):
        scheduler.step(v, scheduler.timesteps[0], x, per_token_timesteps=x)
    with pytest.raises(ValueError, match="`stochastic_sampling` is True"):
        FlowMatchSdeScheduler(stochastic_sampling=True)
    with pytest.raises(ValueError, match="`kind` is 'ddim'"):
        made(sde_kind="ddim").step(v, scheduler.timesteps[0], x)


def tiny_vae(channels):
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(4,), layers_per_block=1,
        latent_channels=channels, norm_num_groups=1, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5,
    )  # fmt: skip


def flux():
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8], guidance_embeds=False,
    )  # fmt: skip
    pipe = diffusers.FluxPipeline(
        scheduler=FlowMatchSdeScheduler(noise_level=0.3), vae=tiny_vae(1), text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=transformer,
    )  # fmt: skip
    embeds = {"prompt_embeds": torch.randn(1, 6, 32), "pooled_prompt_embeds": torch.randn(1, 32)}
    return pipe, {**embeds, "guidance_scale": 0.0}


def sd3():
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32,
        pooled_projection_dim=32, out_channels=4,
    )  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        scheduler=FlowMatchSdeScheduler(noise_level=0.3), vae=tiny_vae(4), text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None,
        tokenizer_3=None, transformer=transformer,
    )  # fmt: skip
    names = ("prompt_embeds", "negative_prompt_embeds")
    embeds = {name: torch.randn(1, 6, 32) for name in names}
    pooled = {name.replace("prompt", "pooled_prompt"): torch.randn(1, 32) for name in names}
    return pipe, {**embeds, **pooled}


@pytest.mark.parametrize("build", [flux, sd3], ids=["FluxPipeline", "StableDiffusion3Pipeline"])
def test_pipeline_end_to_end(build, tmp_path):
    pipe, embeds = build()
    pipe.set_progress_bar_config(disable=True)

    def run(pipe):
        generator = torch.Generator().manual_seed(0)
        pipe.scheduler.generator = generator  # these pipelines do not hand theirs on
        return pipe(
            **embeds, height=8, width=8, num_inference_steps=3, generator=generator,
            output_type="pt",
        ).images  # fmt: skip

    images = run(pipe)
    assert images.shape[:2] == (1, 3)
    assert images.isfinite().all()
    assert torch.equal(run(pipe), images)
    pipe.scheduler.noise_level = 0.0
    assert not torch.equal(run(pipe), images)
    pipe.scheduler.save_pretrained(tmp_path)
    assert FlowMatchSdeScheduler.from_pretrained(tmp_path).config.noise_level == 0.3
