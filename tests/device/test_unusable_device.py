"""A device that a test leaves unusable costs that test alone: its process is replaced."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("xdist")

TESTS = """
import torch

poisoned = []


def synchronize():
    if poisoned:
        raise RuntimeError("an illegal memory access was encountered")


torch.cuda.is_initialized = lambda: True
torch.cuda.synchronize = synchronize


def test_fails():
    assert False  # and nothing is wrong with the device


def test_poisons():
    poisoned.append(True)
    assert False


def test_needs_a_device_that_works():
    synchronize()


def test_so_does_the_next():
    synchronize()
"""


def test_the_next_test_has_a_process_that_works(tmp_path):
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", "no:cacheprovider", "."]
    done = subprocess.run(
        command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert "test_poisons left the device unusable: an illegal memory" in done.stderr, done.stdout
    assert "FAILED test_it.py::test_fails" in done.stdout
    assert "FAILED test_it.py::test_poisons" in done.stdout
    assert "2 passed" in done.stdout, done.stdout
