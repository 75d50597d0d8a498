from __future__ import annotations

import io
import sys

import pytest
import torch

Image = pytest.importorskip("PIL.Image")

from guard_ops.rewards import load_reward  # noqa: E402
from guard_ops.rewards.jpeg_size import QUALITY  # noqa: E402


def test_jpeg_size_is_minus_the_kibibytes_of_the_file():
    torch.manual_seed(0)
    flat, noise = torch.full((3, 32, 48), 0.5), torch.rand(3, 32, 48)
    rewards = load_reward("jpeg_size")(torch.stack([flat, noise]), ["a", "b"], [{}, {}])

    buffer = io.BytesIO()
    pixels = (noise * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=QUALITY)
    assert rewards.tolist()[1] == -len(buffer.getvalue()) / 1024
    assert rewards[0] > rewards[1]


def test_jpeg_size_of_a_video_is_its_frames_mean():
    frames = torch.rand(1, 3, 3, 16, 16)
    reward = load_reward("jpeg_size")
    each = torch.cat([reward(frames[:, f], ["a"], [{}]) for f in range(3)])
    assert float(reward(frames, ["a"], [{}])) == pytest.approx(float(each.mean()))


@pytest.mark.parametrize(
    "name, message",
    [
        ("jpeg", "`reward` is 'jpeg'; it needs one of aesthetic, clip_score, geneval, jpeg_size"),
        ("math:no_such", "which cannot be imported: module 'math' has no attribute"),
        ("math:pi", "`reward` is 'math:pi', which is a float, no function"),
    ],
)
def test_what_is_no_reward_says_so(name, message):
    with pytest.raises(ValueError, match=message):
        load_reward(name)


def test_a_reward_in_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_reward_here.py").write_text("def score(*inputs): ...\n")
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    assert load_reward("my_reward_here:score").__name__ == "score"
