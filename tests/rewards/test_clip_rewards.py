"""PickScore, CLIPScore and the aesthetic predictor on a tiny random CLIP in the real format."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch.nn import functional as F

transformers = pytest.importorskip("transformers", reason="needs guard-ops[rewards]")
safetensors = pytest.importorskip("safetensors.torch")

import tiny_pipelines  # noqa: E402

from guard_ops.rewards import clip, load_reward  # noqa: E402
from guard_ops.rewards.colours import COLOURS, Colours  # noqa: E402
from guard_ops.rewards.detector import Detection  # noqa: E402

SIZE, WIDTH = 32, 24
PROMPTS = ["a red cube", "the lazy dog and a long story", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP with its tokenizer, as its authors save it."""
    path = tmp_path_factory.mktemp("clip")
    vocabulary = tiny_pipelines.clip_tokenizer(path)
    torch.manual_seed(0)
    tower = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "projection_dim": WIDTH,
    }  # fmt: skip
    config = transformers.CLIPConfig(
        text_config={
            **tower, "vocab_size": vocabulary, "eos_token_id": vocabulary - 1,
            "bos_token_id": vocabulary - 2, "pad_token_id": vocabulary - 1,
        },
        vision_config={**tower, "image_size": SIZE, "patch_size": 8},
        projection_dim=WIDTH,
        logit_scale_init_value=3.0,
    )  # fmt: skip
    transformers.CLIPModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(3, 3, 48, 64, generator=torch.Generator().manual_seed(1))


def logits(folder, pixels, texts):
    """``logits_per_image`` of transformers' own model, of an image and its text."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokens = transformers.CLIPTokenizer.from_pretrained(folder)(
        texts, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    small = F.interpolate(pixels, (SIZE, SIZE * 64 // 48), mode="bicubic", antialias=True)
    left = (small.shape[-1] - SIZE) // 2
    cut = small[..., left : left + SIZE].clamp(0, 1)
    mean, std = torch.tensor(clip.MEAN), torch.tensor(clip.STD)
    inputs = (cut - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        return model(pixel_values=inputs, **tokens).logits_per_image.diagonal()


def test_pickscore_is_that_of_plain_pytorch(folder, pixels):
    reward = load_reward("pickscore", [f"pickscore.model={folder}"])
    expected = logits(folder, pixels, PROMPTS) / 26
    assert float(expected.std()) > 1e-3
    torch.testing.assert_close(reward(pixels, PROMPTS, [{}] * 3), expected, rtol=1e-5, atol=1e-6)


def test_clip_score_is_100_cosines_and_a_videos_its_frames_mean(folder, pixels):
    reward = load_reward("clip_score", [f"clip_score.model={folder}"])
    scale = float(torch.tensor(3.0).exp())
    expected = 100 * logits(folder, pixels, PROMPTS) / scale
    found = reward(pixels, PROMPTS, [{}] * 3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    video = reward(pixels[None], [PROMPTS[0]], [{}])
    same = reward(pixels, [PROMPTS[0]] * 3, [{}] * 3)
    torch.testing.assert_close(video, same.mean(0, keepdim=True))


def test_bfloat16_weights_are_near(folder, pixels):
    wide = load_reward("clip_score", [f"clip_score.model={folder}"])(pixels, PROMPTS, [{}] * 3)
    options = [f"clip_score.model={folder}", "clip_score.dtype=bfloat16"]
    narrow = load_reward("clip_score", options)(pixels, PROMPTS, [{}] * 3)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(wide, narrow, rtol=0, atol=2)  # of 100: 8 bits


def test_the_prepared_pixels_are_those_of_pillows_resize(pixels):
    """The official processor resizes 8-bit images with Pillow."""
    image, np = pytest.importorskip("PIL.Image"), pytest.importorskip("numpy")
    for size in ((48, 64), (80, 50), (224, 224)):
        picture = (torch.rand(3, *size, generator=torch.Generator().manual_seed(2)) * 255).byte()
        pillow = image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
        scale = SIZE / min(size)
        width, height = int(size[1] * scale), int(size[0] * scale)
        small = pillow.resize((width, height), image.Resampling.BICUBIC)
        left, top = (width - SIZE) // 2, (height - SIZE) // 2
        cut = small.crop((left, top, left + SIZE, top + SIZE))
        expected = torch.from_numpy(np.array(cut)).permute(2, 0, 1) / 255
        std = torch.tensor(clip.STD)[:, None, None]
        found = clip.prepare(picture[None] / 255, SIZE)[0] * std
        mean = torch.tensor(clip.MEAN)[:, None, None]
        # Pillow rounds to 8 bits and cuts overshoots off after each direction, ours once
        error = (found + mean - expected).abs() * 255
        assert error.max() < 8
        assert error.mean() < 0.5


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_the_aesthetic_predictor_is_five_linear_maps(folder, pixels, tmp_path, suffix):
    torch.manual_seed(3)
    sizes, tensors = (WIDTH, 1024, 128, 64, 16, 1), {}
    for place, (before, after) in zip((0, 2, 4, 6, 7), itertools.pairwise(sizes), strict=True):
        tensors[f"layers.{place}.weight"] = torch.randn(after, before) / before**0.5
        tensors[f"layers.{place}.bias"] = torch.randn(after)
    if suffix == "pth":
        torch.save(tensors, tmp_path / "aesthetic-model.pth")
    else:
        safetensors.save_file(tensors, tmp_path / "aesthetic-model.safetensors")
    options = [f"aesthetic.model={folder}", f"aesthetic.head={tmp_path}"]
    found = load_reward("aesthetic", options)(pixels, PROMPTS, [{}] * 3)

    x = clip.Clip(folder, folder, torch.device("cpu"), torch.float32).images(pixels)
    torch.testing.assert_close(x.norm(dim=1), torch.ones(3))
    for place in (0, 2, 4, 6, 7):
        x = F.linear(x, tensors[f"layers.{place}.weight"], tensors[f"layers.{place}.bias"])
    torch.testing.assert_close(found, x[:, 0])

    tensors["layers.7.weight"] = torch.randn(1, 17)
    (tmp_path / "wrong").mkdir()
    safetensors.save_file(tensors, tmp_path / "wrong" / "model.safetensors")
    wrong = load_reward("aesthetic", [options[0], f"aesthetic.head={tmp_path / 'wrong'}"])
    with pytest.raises(ValueError, match="has not the weights of trl-lib/ddpo-aesthetic"):
        wrong.prepare(torch.device("cpu"))


def test_colours_are_those_of_the_nearest_text(folder):
    """The name of a colour is the one whose texts the crop's embedding is nearest to."""
    colours = Colours(str(folder))
    image = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(4))
    objects = [Detection((0, 0, 20, 30), 1.0), Detection((10, 5, 40, 40), 1.0)]
    found = colours(image, objects, "dog")
    towers = colours.prepare(torch.device("cpu"))
    for (left, top, right, bottom), name in zip((x.box for x in objects), found, strict=True):
        crop = towers.images(image[None, :, top:bottom, left:right])[0]
        texts = [
            towers.texts([f"a photo of a {c} dog", f"a photo of a {c}-colored dog",
                          f"a photo of a {c} object"]).mean(0)
            for c in COLOURS
        ]  # fmt: skip
        assert name == COLOURS[int(torch.stack([crop @ t / t.norm() for t in texts]).argmax())]


def test_missing_weights_name_the_model_and_how_to_place_it(folder, tmp_path, monkeypatch):
    remedy = (
        "`hf download yuvalkirstain/PickScore_v1 --local-dir DIR`; copy DIR here and give "
        r"reward_options=\[pickscore.model=DIR\]"
    )
    with pytest.raises(ValueError, match=r"'/no/such', which is no folder.*" + remedy):
        load_reward("pickscore", ["pickscore.model=/no/such"])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"which has no \*.safetensors; it needs.*" + remedy):
        load_reward("pickscore", [f"pickscore.model={tmp_path}"])

    def offline(*arguments, **settings):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    reward = load_reward("pickscore")
    with pytest.raises(ValueError, match="hub does not give: no route to host.*" + remedy):
        reward.fetch()


def test_neither_torchvision_nor_pillow_is_needed(folder, pixels, monkeypatch):
    for name in ("torchvision", "PIL.Image"):
        monkeypatch.setitem(sys.modules, name, None)
    reward = load_reward("pickscore", [f"pickscore.model={folder}"])
    assert reward(pixels, PROMPTS, [{}] * 3).isfinite().all()
