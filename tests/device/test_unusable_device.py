"""A device that a test leaves unusable costs that test alone: its process is replaced."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("xdist")

# What conftest.py asks of torch and guard_ops, which take long to import in every process.
TORCH = """
class cuda:
    poisoned = []
    is_available = staticmethod(lambda: False)
    is_initialized = staticmethod(lambda: True)

    @classmethod
    def synchronize(cls):
        if cls.poisoned:
            raise RuntimeError("an illegal memory access was encountered")
"""
BACKENDS = "available_backends = use_backend = select = lambda *names: ()"
TESTS = """
from torch import cuda


def test_fails():
    assert False  # and nothing is wrong with the device


def test_poisons():
    cuda.poisoned.append(True)
    assert False


def test_needs_a_device_that_works():
    cuda.synchronize()


def test_so_does_the_next():
    cuda.synchronize()
"""


def test_the_next_test_has_a_process_that_works(tmp_path):
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "guard_ops").mkdir()
    for name in ("__init__", "backends"):
        (tmp_path / "guard_ops" / f"{name}.py").write_text(BACKENDS)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    for kind in ("TRITON_INTERPRET", "GUARD_OPS_EMULATED"):
        environment.pop(kind, None)
    words = "-m pytest -q -p xdist -n 1 -p no:cacheprovider ."
    command = [sys.executable, *words.split()]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert "test_poisons left the device unusable: an illegal memory" in done.stderr, done.stdout
    assert "FAILED test_it.py::test_fails" in done.stdout
    assert "FAILED test_it.py::test_poisons" in done.stdout
    assert "2 passed" in done.stdout, done.stdout
