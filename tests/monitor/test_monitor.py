"""A monitor beside a run: what it writes, and that a continued run goes on with it."""

from __future__ import annotations

import json

import pytest
import torch

from guard_ops.monitor import Monitor
from guard_ops.monitor.monitor import read_monitor

N = 40
PROMPTS = [f"p{n % 4}" for n in range(N)]
START = torch.rand(N, generator=torch.Generator().manual_seed(0))
FEATURES = torch.randn(N, 3, generator=torch.Generator().manual_seed(1))


def read(monitor, iteration, proxy, gold, scale=1.0):
    return monitor.add(iteration, START + proxy, START + gold, scale * FEATURES, PROMPTS)


def test_numbers_of_the_metrics(tmp_path):
    monitor = Monitor(tmp_path)
    first = read(monitor, 0, 0.0, 0.0)
    assert first["gap"] == first["gold_drop"] == first["over_optimizing"] == 0
    assert first["gold"] == pytest.approx(float(START.mean()))
    assert first["frechet"] == pytest.approx(0, abs=1e-6)
    second = read(monitor, 5, 1.0, -0.5, scale=0.5)
    # the proxy rose by 1, gold fell by 0.5, in units of the samples' spread
    assert second["gap"] == pytest.approx(1.5 / float(START.std()), rel=1e-4)
    assert second["gold_drop"] == pytest.approx(0.5, rel=1e-5)
    assert second["diversity"] == pytest.approx(first["diversity"] / 2)
    assert second["over_optimizing"] == 1
    assert not monitor.is_best
    lines = [json.loads(line) for line in (tmp_path / "monitor.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 5]
    assert len(lines[1]["gold"]) == N


def test_a_continued_run_goes_on_after_its_checkpoint(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
        monitor = Monitor(folder)
        for n in range(4):  # of parts, the last was after its checkpoint of iteration 2
            last = read(monitor, n, float(n), -0.1 * n, 1 - 0.1 * n)
    again = Monitor(parts, iteration=2)
    assert [x.iteration for x in again.readings] == [0, 1, 2]
    assert read(again, 3, 3.0, -0.1 * 3, 1 - 0.1 * 3) == last
    assert (whole / "monitor.jsonl").read_bytes() == (parts / "monitor.jsonl").read_bytes()
    assert read_monitor(parts) == again.readings
    assert Monitor(parts).readings == []  # a run that begins has no past


def test_a_damaged_file_is_said_and_begun_again(tmp_path):
    monitor = Monitor(tmp_path)
    read(monitor, 0, 0.0, 0.0)
    read(monitor, 1, 0.0, 0.0)
    path = tmp_path / "monitor.jsonl"
    for text in (
        "{",
        '{"iteration": 0}\n',
        path.read_text().replace('"iteration": 1', '"iteration": 0'),
    ):
        path.write_text(text)
        with pytest.warns(RuntimeWarning, match=r"monitor.jsonl cannot be read .* begins again"):
            assert Monitor(tmp_path, iteration=1).readings == []


def test_logits_give_an_inception_score(tmp_path):
    monitor = Monitor(tmp_path)
    logits = 50 * torch.eye(4).repeat(10, 1)
    numbers = monitor.add(0, START, START, FEATURES, PROMPTS, logits)
    assert numbers["inception_score"] == pytest.approx(4)
    assert "frechet" not in Monitor(tmp_path).add(0, START, START)


def test_it_needs_no_spread(tmp_path):
    monitor, flat = Monitor(tmp_path), torch.ones(3)
    monitor.add(0, flat, flat)
    numbers = monitor.add(1, 2 * flat, flat / 2)
    assert numbers["gap"] == 0
    assert numbers["over_optimizing"] == 1
    assert "since iteration 1: gold is 0.5 below" in str(monitor.verdict())
