"""Adapters: every target matches, only they are trained, and diffusers loads what is exported."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from accelerate import init_empty_weights

from guard_ops.policies import POLICIES, TARGETS, add_lora
from guard_ops.policies.loading import empty_transformer
from guard_ops.policies.published import PUBLISHED, Published

PIPELINES = ("sd3", "flux", "wan", "qwen")


def adapted(load, name, rank=4, **changes):
    policy = load(name, **changes)
    policy.add_lora(rank, 2 * rank)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:  # B is zero at first
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    return policy


def call(policy):
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    timestep = policy.schedule(4).timesteps[1].expand(2)
    with torch.no_grad():
        return policy.velocity(latents, timestep, policy.encode(["a red cube", "a dog"]))


@pytest.mark.parametrize("name", PIPELINES)
def test_only_adapters_are_trainable_and_they_are_float32(name, load):
    policy = adapted(load, name, dtype=torch.bfloat16)

    trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}

    assert trained
    assert all(".lora_A." in n or ".lora_B." in n for n in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    latents = torch.randn(1, *policy.latent_shape)
    velocity = policy.velocity(latents, policy.schedule(4).timesteps[:1], policy.encode(["a dog"]))
    assert velocity.dtype == torch.bfloat16
    velocity.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    frozen = [n for n, p in policy.named_parameters() if ".lora_" in n and not p.requires_grad]
    # what the last blocks make of the text, and what its tokens ask for
    assert len(frozen) == {"qwen": 8, "sd3": 2}.get(name, 0)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_new_adapter_and_the_reference_are_the_base_bitwise(name, load):
    base = call(load(name))
    policy = load(name)
    policy.add_lora(4, 8)
    assert torch.equal(call(policy), base)

    policy = adapted(load, name)
    trained = call(policy)
    with policy.reference():
        assert torch.equal(call(policy), base)
    assert not torch.allclose(trained, base)
    assert torch.equal(call(policy), trained)


@pytest.mark.parametrize("name", PIPELINES)
def test_exported_adapters_give_the_trained_velocities_in_a_fresh_pipeline(
    name, load, model, tmp_path
):
    policy = adapted(load, name)
    trained = call(policy)
    policy.export(tmp_path / "lora")
    assert [p.suffix for p in (tmp_path / "lora").iterdir()] == [".safetensors"]

    pipe = diffusers.DiffusionPipeline.from_pretrained(model(name))
    pipe.load_lora_weights(tmp_path / "lora")
    fresh = load(name)
    fresh.transformer = pipe.transformer

    torch.testing.assert_close(call(fresh), trained, rtol=1e-5, atol=1e-6)


def test_a_frozen_copy_is_the_reference_of_a_full_fine_tuning(load):
    policy = load("sd3")
    with pytest.raises(RuntimeError, match=r"keep_reference\(\) first"), policy.reference():
        pass
    policy.keep_reference()
    policy.transformer.requires_grad_(True)
    base = call(policy)
    with torch.no_grad():
        policy.transformer.proj_out.weight.mul_(2)

    with policy.reference():
        assert torch.equal(call(policy), base)
    assert not torch.allclose(call(policy), base)
    names = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert all(n.startswith("transformer.") for n in names)


def test_a_full_fine_tuning_is_exported_whole(load, model, tmp_path):
    policy = load("flux")
    with torch.no_grad():
        policy.transformer.proj_out.weight.mul_(2)
    policy.export(tmp_path)

    loaded = type(policy.transformer).from_pretrained(tmp_path / "transformer")

    assert torch.equal(loaded.proj_out.weight, policy.transformer.proj_out.weight)


def test_a_target_that_matches_nothing_is_an_error(load):
    policy = load("qwen")
    with pytest.raises(ValueError, match=r"'img_mlp.net.2.proj', which matches no Linear layer"):
        policy.add_lora(4, 8, [*TARGETS["qwen_image"], "img_mlp.net.2.proj"])


# Counted with the same configurations by others too: diffusers' own pages and the recipes' logs.
PARAMETERS = {
    "sd3_5_medium": (2_243_171_520, 32, 18_776_064),
    "flux1_dev": (11_901_408_320, 64, 179_306_496),
    "wan2_1_t2v_1_3b": (1_418_996_800, 32, 23_592_960),
    "qwen_image": (20_430_401_088, 64, 424_673_280),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "wan2_1_t2v_1_3b" else pytest.mark.slow_suite)
        for name in PARAMETERS
    ],
)
def test_published_sizes_and_the_adapters_of_the_published_recipes(name):
    """At full size, without values: every target matches, and as many parameters as published."""
    published: Published = PUBLISHED[name]
    parameters, rank, trained = PARAMETERS[name]
    smaller = {"pos_embed_max_size": 32} if "pos_embed_max_size" in published.transformer else {}
    transformer = empty_transformer(published.transformer | smaller)  # it counts no parameter
    assert sum(p.numel() for p in transformer.parameters()) == parameters

    with init_empty_weights():
        add_lora(transformer, rank, 2 * rank, TARGETS[POLICIES[published.pipeline].backbone])

    assert sum(p.numel() for p in transformer.parameters() if p.requires_grad) == trained
    json.dumps(published.transformer)
