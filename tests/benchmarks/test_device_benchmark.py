"""benchmarks/device.py and make gpu-check, as far as they go without a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import device

ROOT = Path(__file__).parents[2]


def rows(large_share, small_microseconds, eager, compiled):
    """The rows that the bounds look at; chains as many times slower as said."""
    out = []
    for workload, share, us in (
        (device.LARGE, large_share, 100.0),
        (device.SMALL, 0.1, small_microseconds),
    ):
        base = {"workload": workload.name, "dtype": "bfloat16", "form": "mean"}
        base |= {"objective": "article", "share_of_copy": share}
        out += [
            base | {"contender": "triton", "path": "two_launches", "microseconds": us / 2},
            base | {"contender": "triton", "path": "chosen", "microseconds": us},
            base | {"contender": "eager", "microseconds": us * eager},
            base | {"contender": "torch.compile", "microseconds": us * compiled},
        ]
    return out


def test_bounds_that_are_met_say_nothing():
    assert device.bounds(rows(0.85, 12.0, 20.0, 2.5)) == []


@pytest.mark.parametrize(
    "numbers, words",
    [
        ((0.8, 12.0, 20.0, 2.5), ["0.80 of a copy, not 0.85"]),
        ((0.9, 13.0, 20.0, 2.5), ["13.0 microseconds, not 12.0"]),
        ((0.9, 11.0, 19.0, 2.5), ["19.0 times eager", "19.0 times eager"]),
        ((0.9, 11.0, 21.0, 2.0), ["2.0 times torch.compile", "2.0 times torch.compile"]),
    ],
)
def test_a_bound_that_is_missed_is_named(numbers, words):
    missed = device.bounds(rows(*numbers))
    assert len(missed) == len(words)
    assert all(word in line for word, line in zip(words, missed, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the check itself")
def test_gpu_check_says_what_it_did_not_run():
    command = [sys.executable, str(ROOT / "scripts" / "gpu_check.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for step in ("build", "doctor", "tests", "benchmarks", "sanitizer"):
        assert f"  {step}: python" in done.stdout
