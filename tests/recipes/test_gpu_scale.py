"""``make gpu-scale``: without a GPU it says so; what it measures runs on small networks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from guard_ops.policies.published import PUBLISHED

ROOT = Path(__file__).parents[2]
SMALL = {
    "sd3_5_medium": {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
                     "joint_attention_dim": 32, "caption_projection_dim": 16,
                     "pooled_projection_dim": 24, "pos_embed_max_size": 8,
                     "dual_attention_layers": [0]},
    "flux1_dev": {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 128,
                  "num_attention_heads": 1, "joint_attention_dim": 32,
                  "pooled_projection_dim": 24},
}  # fmt: skip


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_scale

    yield gpu_scale
    sys.modules.pop("gpu_scale")


def test_without_a_gpu_it_says_so_and_writes_nothing(script, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(script.results, "save", lambda *_, **__: pytest.fail("it writes"))
    assert script.main([]) == 0
    assert "there is no GPU here: nothing was run" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", [pytest.param("sd3_5_medium", marks=pytest.mark.slow_suite), "flux1_dev"]
)
def test_each_part_of_an_iteration_is_timed(name, script):
    words = ["height=32", "width=32", "text_length=8", "lora_rank=2"]
    config = PUBLISHED[name].transformer | SMALL[name]

    rows = script.measure(name, torch.device("cpu"), 4, words, config)

    assert [row["loss"] for row in rows] == ["fused", "plain"]
    for row in rows:
        seconds = row["seconds"]
        parts = {"rollout", "rewards", "velocities", "objective", "backward", "optimizer"}
        assert parts | {"update"} == seconds.keys()
        assert all(value >= 0 for value in seconds.values())
        inside = seconds["objective"] + seconds["backward"] + seconds["optimizer"]
        assert inside <= seconds["update"]  # the objective's time has pass 1 in it
        assert row["trained_steps"] == row["steps"] - 1
