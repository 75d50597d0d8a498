"""SIGKILL at any moment: a run that is resumed ends in the bits of one that never stopped."""

import contextlib
import functools
import importlib
import io
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import PROCESSES
from tiny import tiny_trainer


@pytest.fixture
def differences(monkeypatch):
    """Of two finished runs: the names of what they do not share to the bit."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    return importlib.import_module("kill_and_resume").differences


def tiny(out, iterations):
    """A training of the tiny policy, in a process."""
    torch.set_num_threads(1)
    tiny_trainer(out, resume=True, iterations=iterations, checkpoint_every=3).fit(progress=False)


def train(*options):
    """``guard-ops train``, in a process, of small groups and a judge that takes no time to fit."""
    from guard_ops import cli
    from guard_ops.digits import jobs

    class Gold:
        def __init__(self, digits):
            pass

        def probability(self, samples, condition):
            return samples.flatten(1).mean(1)

        def __call__(self, samples, condition, probability):
            return {"gold": float(probability.mean())}

    jobs.TrainConfig = functools.partial(jobs.TrainConfig, group_size=4, tensorboard=False)
    jobs.EVALUATION_SAMPLES = 2
    jobs.Gold = Gold
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        sys.exit(cli.main(["train", "digits", *options]))


def train_until(line, *options):
    """``guard-ops train``, in a process that is killed when it has written so many metrics."""
    from guard_ops.trainer.metrics import MetricsWriter

    write = MetricsWriter.write

    def last(writer, iteration, numbers):
        write(writer, iteration, numbers)
        if iteration == line:
            os.kill(os.getpid(), signal.SIGKILL)

    MetricsWriter.write = last
    train(*options)


def start(work, *arguments):
    process = PROCESSES.Process(target=work, args=arguments)
    process.start()
    return process


def finish(work, *arguments, status=0):
    process = start(work, *arguments)
    process.join(120)
    assert process.exitcode == status


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


@pytest.mark.slow_suite  # and `make kill-test` does it to the command
def test_a_run_killed_many_times_ends_in_the_same_bits(tmp_path, differences):
    iterations, seconds = 150, random.Random(time.time_ns())
    finish(tiny, tmp_path / "whole", iterations)
    killed_run = (tiny, tmp_path / "killed", iterations)
    delays = [seconds.uniform(0, 0.25) for _ in range(6)]
    metrics = tmp_path / "killed" / "metrics.jsonl"
    killed = sum(kill_while_training(metrics, delay, *killed_run) for delay in delays)
    assert killed >= 3, f"killed {killed} times with {delays}"
    finish(*killed_run)
    assert differences(tmp_path / "whole", tmp_path / "killed", iterations) == []


def test_guard_ops_train_killed_and_resumed_ends_in_the_same_bits(tmp_path, differences):
    options = ["pretrain_steps=20", "iterations=4", "checkpoint_every=2"]
    finish(train, *options, f"out={tmp_path / 'whole'}")
    killed_run = (*options, "resume=true", f"out={tmp_path / 'killed'}")
    finish(train_until, 3, *killed_run, status=-signal.SIGKILL)  # its checkpoint has two lines
    assert len((tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()) == 3
    finish(train, *killed_run)
    assert differences(tmp_path / "whole", tmp_path / "killed", 4) == []


def test_what_differs_is_named(tmp_path, differences):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tiny_trainer(tmp_path / name, seed=seed).fit(progress=False)
    assert differences(tmp_path / "a", tmp_path / "b", 6) == []
    named = set(differences(tmp_path / "a", tmp_path / "c", 6))
    assert {"model: correction.bias", "ema: correction.bias", "optimizer: 0.exp_avg"} <= named
    assert {"state: settings", "metrics"} <= named
    path = tmp_path / "b" / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"iteration": 3', b'"iteration": 2'))
    assert differences(tmp_path / "a", tmp_path / "b", 6) == ["metrics", "metrics: iterations"]
