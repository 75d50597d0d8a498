"""What is wrong with a model folder is said before a weight is read."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from guard_ops.policies import POLICIES, ModelError, look
from guard_ops.policies.encodings import identity
from guard_ops.policies.loading import WEIGHTS, load_transformer
from guard_ops.trainer import Engine


@pytest.fixture
def copy(model, tmp_path):
    shutil.copytree(model("sd3"), tmp_path / "sd3")
    return tmp_path / "sd3"


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_missing_component_is_named(copy):
    shutil.rmtree(copy / "text_encoder_2")
    with pytest.raises(ModelError, match="has no folder 'text_encoder_2', which its model_index"):
        look(str(copy), POLICIES)


@pytest.mark.parametrize("part", ["transformer", "scheduler"])
def test_a_missing_configuration_is_named(part, copy):
    shutil.rmtree(copy / part)
    with pytest.raises(ModelError, match=f"{part}.*is not there: the {part} is missing"):
        look(str(copy), POLICIES)


def test_weights_that_are_not_safetensors_are_refused(copy):
    (copy / "transformer" / WEIGHTS).rename(copy / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has no .safetensors file; no other is read"):
        look(str(copy), POLICIES)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"_class_name": "DDIMScheduler"}, "has a DDIMScheduler; training samples a flow"),
        ({"_class_name": "UniPCMultistepScheduler"}, "without use_flow_sigmas"),
        ({"stochastic_sampling": True}, "with stochastic_sampling"),
        ({"invert_sigmas": True}, "with invert_sigmas"),
    ],
)
def test_an_unsupported_scheduler_is_named(changes, message, copy):
    change(copy / "scheduler" / "scheduler_config.json", **changes)
    with pytest.raises(ModelError, match=message):
        look(str(copy), POLICIES)


def test_another_pipeline_is_named(copy):
    change(copy / "model_index.json", _class_name="StableDiffusionXLPipeline")
    with pytest.raises(ModelError, match="is a StableDiffusionXLPipeline; this trainer has Flux"):
        look(str(copy), POLICIES)


def test_a_folder_of_something_else_says_what_is_needed(tmp_path):
    with pytest.raises(ModelError, match=r"model_index.json is not there: it needs a folder in"):
        look(str(tmp_path), POLICIES)
    with pytest.raises(ModelError, match="is no folder; it needs one, or an id such as owner/name"):
        look(str(tmp_path / "nothing"), POLICIES)


def test_incomplete_and_foreign_weights_are_named(copy):
    file = copy / "transformer" / WEIGHTS
    tensors = load_file(file)
    weight = tensors.pop("proj_out.weight")
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"no weights for 1 parameters: proj_out.weight"):
        load_transformer(look(str(copy), POLICIES), torch.float32, "cpu")
    save_file({**tensors, "proj_out.weight": weight[:3].clone()}, file)
    with pytest.raises(ModelError, match=r"'proj_out.weight' of shape \(3, 32\), but its config"):
        load_transformer(look(str(copy), POLICIES), torch.float32, "cpu")
    save_file({**tensors, "proj_out.wait": weight}, file)
    with pytest.raises(ModelError, match=r"'proj_out.wait', which its config.json does not mean"):
        load_transformer(look(str(copy), POLICIES), torch.float32, "cpu")


def test_sharded_files_are_read(copy, load, model):
    folder = copy / "transformer"
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {"part-1.safetensors": names[::2], "part-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / WEIGHTS).unlink()
    where = {name: file for file, part in parts.items() for name in part}
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))

    got = load_transformer(look(str(copy), POLICIES), torch.float32, "cpu")

    assert all(torch.equal(value, tensors[name]) for name, value in got.state_dict().items())
    (folder / "part-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"part-2.safetensors is not there; the weights are incom"):
        load_transformer(look(str(copy), POLICIES), torch.float32, "cpu")


def test_prompts_are_encoded_once_and_the_encoders_leave(load, monkeypatch, tmp_path):
    policy = load("sd3", encodings=tmp_path)
    loads: list[int] = []
    original = policy.encodings._load
    monkeypatch.setattr(policy.encodings, "_load", lambda: loads.append(1) or original())

    first = policy.encode(["a dog", "a cube", "a dog"])
    again = load("sd3", encodings=tmp_path)  # another process with the same folder
    monkeypatch.setattr(again.encodings, "_load", lambda: pytest.fail("encoded again"))
    second = again.encode(["a cube", "a dog", "a dog"])

    assert len(loads) == 1
    assert first["prompt"].shape == (3, 77 + 16, 48)
    assert torch.equal(first["prompt"][0], first["prompt"][2])
    assert torch.equal(second["prompt"][0], first["prompt"][1])
    assert {p.suffix for p in policy.encodings.root.rglob("*") if p.is_file()} == {".safetensors"}
    assert not any("text_encoder" in name for name, _ in policy.named_parameters())


def test_another_length_or_dtype_is_encoded_again(load, tmp_path):
    load("sd3", text_length=8, encodings=tmp_path).encode(["a dog"])
    assert load("sd3", encodings=tmp_path).encodings.prepare(["a dog"]) == 1
    assert load("sd3", dtype=torch.bfloat16, encodings=tmp_path).encodings.prepare(["a dog"]) == 1


@pytest.mark.parametrize("name", ["sd3", "flux", "wan", "qwen"])
def test_an_empty_policy_is_filled_when_the_engine_has_given_it_memory(name, load):
    expected = load(name)
    policy = load(name, empty=True)
    assert all(p.is_meta for p in policy.parameters())
    policy.transformer.requires_grad_(True)

    Engine(device="cpu").wrap(policy)

    for (n, tensor), (m, other) in zip(
        expected.transformer.state_dict().items(),
        policy.transformer.state_dict().items(),
        strict=True,
    ):
        assert n == m
        assert torch.equal(tensor, other), n
    latents = torch.randn(1, *policy.latent_shape)
    timestep, condition = policy.schedule(4).timesteps[1:2], policy.encode(["a dog"])
    with torch.no_grad():
        a, b = (each.velocity(latents, timestep, condition) for each in (expected, policy))
    assert torch.equal(a, b)


def test_encodings_are_of_files_with_their_sizes_which_a_fetch_does_not_change(model, tmp_path):
    copy = tmp_path / "commit"
    shutil.copytree(model("sd3"), copy)
    folder = look(str(copy), POLICIES)
    weights = next((copy / "text_encoder").glob("*.safetensors"))
    before = identity(folder, torch.float32, 16)
    assert identity(folder, torch.float32, 16) == before
    weights.write_bytes(weights.read_bytes() + b" ")  # another size
    assert identity(folder, torch.float32, 16) != before

    hub = folder._replace(model="somebody/sd3")
    fetched = identity(hub, torch.float32, 16)
    weights.unlink()
    assert identity(hub, torch.float32, 16) == fetched
    copy.rename(tmp_path / "other")
    assert identity(hub._replace(path=tmp_path / "other"), torch.float32, 16) != fetched
