"""scripts/sanitizers.py: what runs under which sanitizer."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def sanitizers(monkeypatch):
    """The script, as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield importlib.import_module("sanitizers")
    for name in ("sanitizers", "compiling", "toolchain"):
        sys.modules.pop(name, None)


def test_every_cpp_test_with_threads_is_under_the_thread_sanitizer(sanitizers):
    tests = (ROOT / "csrc" / "tests").glob("*_test.cpp")
    threaded = {path.stem for path in tests if "std::thread" in path.read_text()}
    assert threaded
    names = {path.stem for path in (ROOT / "csrc" / "tests").glob("*_test.cpp")}
    assert {name for name in names if re.search(sanitizers.THREAD.tests, name)} == threaded


def test_the_python_tests_are_there(sanitizers):
    for name in sanitizers.PYTHON_TESTS:
        assert (ROOT / "tests" / f"test_{name}.py").is_file()


OVERFLOW = "int main() { int* x = new int[2]; int y = x[2]; delete[] x; return y & 0; }"


def test_a_finding_ends_the_program(sanitizers, tmp_path):
    (tmp_path / "overflow.cpp").write_text(OVERFLOW)
    flags = sanitizers.ADDRESS.definitions["CMAKE_CXX_FLAGS"].split()
    program = str(tmp_path / "overflow")
    subprocess.run(["c++", *flags, "-o", program, program + ".cpp"], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
