"""A recipe on two ranks, under torchrun, gives the weights that one rank gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from guard_ops.monitor.monitor import read_monitor

ROOT = Path(__file__).parents[2]
WAYS = {
    "ddp": ("sd3_5_medium", {}, "lora/pytorch_lora_weights.safetensors"),
    "fsdp": (
        "flux1_dev",
        {"train": "full", "sharding": "fsdp"},
        "weights/transformer/diffusion_pytorch_model.safetensors",
    ),
}


@pytest.mark.slow_suite
@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_train_what_one_trains(way, tiny_words, tmp_path):
    recipe, changes, file = WAYS[way]
    words = tiny_words(recipe, dtype="float32", evaluation_prompts=2, **changes)
    (tmp_path / "contrast.py").write_text(
        "def gold(pixels, prompts, metadata):\n    return pixels.flatten(1).std(1)\n"
    )
    (tmp_path / "held-out.txt").write_text("a blue ball\na dog\n")
    words += ["gold=contrast:gold", f"gold_prompts={tmp_path / 'held-out.txt'}", "gold_samples=5"]
    weights, readings = [], []
    for ranks in (1, 2):
        out = tmp_path / f"ranks-{ranks}"
        done = subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
                "-m", "guard_ops", "train", recipe, f"out={out}", *words,
            ],
            cwd=ROOT, capture_output=True, text=True, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("trained weights, for diffusers") == 1
        weights.append(load_file(out / file))
        readings.append(read_monitor(out))
    for alone, shared in zip(*readings, strict=True):
        assert alone.iteration == shared.iteration
        assert shared.gold == pytest.approx(alone.gold, abs=1e-4)  # of 5 samples, in their order
    assert [x.iteration for x in readings[0]] == [0, 2]
    one, two = weights
    assert one.keys() == two.keys()
    for name, value in one.items():
        # float32: gradients are summed in another order. A step is 1e-3.
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=2e-6)
