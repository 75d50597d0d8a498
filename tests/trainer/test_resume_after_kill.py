"""SIGKILL at random moments: a run that is resumed ends in the bits of one that never stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

TINY = [sys.executable, str(Path(__file__).with_name("tiny.py"))]
TRAIN = [sys.executable, "-m", "guard_ops", "train"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
ENVIRONMENT["PYTHONPATH"] = str(Path(__file__).parents[2])


def start(command):
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(command):
    process = start(command)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()


def kill_while_training(command, metrics, after):
    """SIGKILL ``after`` seconds past the first line this process writes; False: it was done."""
    size = metrics.stat().st_size if metrics.exists() else 0
    process = start(command)
    while process.poll() is None:
        if metrics.exists() and metrics.stat().st_size != size:
            time.sleep(after)
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGKILL), errors.decode()
    return process.returncode != 0


def lines(out):
    text = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in text]


def assert_same_run(a, b, iteration):
    for name in ("model", "ema", "optimizer", "rng"):
        path = Path("checkpoints") / f"iteration-{iteration:06d}" / f"{name}.safetensors"
        left, right = load_file(a / path), load_file(b / path)
        assert left.keys() == right.keys()
        assert left
        for key in left.keys() - {"torch"}:  # the global generator, which nothing seeds or uses
            assert torch.equal(left[key], right[key]), f"{name}: {key}"
    assert lines(a) == lines(b)
    assert [x["iteration"] for x in lines(b)] == list(range(1, iteration + 1))


def test_a_run_killed_many_times_ends_in_the_same_bits(tmp_path):
    iterations, seconds = "150", random.Random(time.time_ns())
    finish([*TINY, str(tmp_path / "whole"), iterations])
    command = [*TINY, str(tmp_path / "killed"), iterations]
    delays = [seconds.uniform(0, 0.25) for _ in range(6)]
    metrics = tmp_path / "killed" / "metrics.jsonl"
    killed = sum(kill_while_training(command, metrics, delay) for delay in delays)
    assert killed >= 3, f"killed {killed} times with {delays}"
    finish(command)
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 150)


def test_guard_ops_train_killed_and_resumed_ends_in_the_same_bits(tmp_path):
    options = ["--pretrain-steps", "20", "--iterations", "9", "--checkpoint-every", "2"]
    finish([*TRAIN, *options, "--out", str(tmp_path / "whole")])
    command = [*TRAIN, *options, "--resume", "--out", str(tmp_path / "killed")]
    metrics = tmp_path / "killed" / "metrics.jsonl"
    assert kill_while_training(command, metrics, random.Random(time.time_ns()).uniform(0, 0.8))
    finish(command)
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 9)
