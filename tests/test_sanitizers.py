"""scripts/sanitizers.py: what runs under which sanitizer."""

from __future__ import annotations

import importlib
import re
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


def test_a_finding_ends_the_program(sanitizers):
    for sanitizer in (sanitizers.ADDRESS, sanitizers.THREAD):
        assert "-fno-sanitize-recover=all" in sanitizer.definitions["CMAKE_CXX_FLAGS"]
