"""SIGKILL at random moments: a run that is resumed ends in the bits of one that never stopped.

The processes are forks of one that has imported torch, which takes longer than these runs.
"""

import contextlib
import io
import json
import multiprocessing
import random
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch"])


def tiny(out, iterations):
    """A training of the tiny policy, in a process."""
    from tiny import tiny_trainer

    torch.set_num_threads(1)
    tiny_trainer(out, resume=True, iterations=iterations, checkpoint_every=3).fit(progress=False)


def train(*options):
    """``guard-ops train``, in a process."""
    from guard_ops import cli

    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        sys.exit(cli.main(["train", *options]))


def start(work, *arguments):
    process = PROCESSES.Process(target=work, args=arguments)
    process.start()
    return process


def finish(work, *arguments):
    process = start(work, *arguments)
    process.join(120)
    assert process.exitcode == 0


def kill_while_training(metrics, after, work, *arguments):
    """SIGKILL ``after`` seconds past the first line this process writes; False: it was done."""
    size = metrics.stat().st_size if metrics.exists() else 0
    process = start(work, *arguments)
    while process.is_alive():
        if metrics.exists() and metrics.stat().st_size != size:
            time.sleep(after)
            process.kill()
            break
        time.sleep(0.002)
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


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
    iterations, seconds = 150, random.Random(time.time_ns())
    finish(tiny, tmp_path / "whole", iterations)
    killed_run = (tiny, tmp_path / "killed", iterations)
    delays = [seconds.uniform(0, 0.25) for _ in range(6)]
    metrics = tmp_path / "killed" / "metrics.jsonl"
    killed = sum(kill_while_training(metrics, delay, *killed_run) for delay in delays)
    assert killed >= 3, f"killed {killed} times with {delays}"
    finish(*killed_run)
    assert_same_run(tmp_path / "whole", tmp_path / "killed", iterations)


def test_guard_ops_train_killed_and_resumed_ends_in_the_same_bits(tmp_path):
    options = ["--pretrain-steps", "20", "--iterations", "9", "--checkpoint-every", "2"]
    finish(train, *options, "--out", str(tmp_path / "whole"))
    killed_run = (train, *options, "--resume", "--out", str(tmp_path / "killed"))
    metrics = tmp_path / "killed" / "metrics.jsonl"
    after = random.Random(time.time_ns()).uniform(0, 0.8)
    assert kill_while_training(metrics, after, *killed_run)
    finish(*killed_run)
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 9)
