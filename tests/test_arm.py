"""scripts/arm.py: what counts as the same bits on two processors."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest


@pytest.fixture
def arm(monkeypatch):
    """The script, as a module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    yield importlib.import_module("arm")
    for name in ("arm", "compiling", "toolchain"):
        sys.modules.pop(name, None)


def test_the_same_cases_have_no_differences(arm):
    assert arm.differences("avx512\nD=1 01\nD=7 02\n", "neon\nD=1 01\nD=7 02\n") == ""


def test_a_different_sum_and_a_missing_case_are_shown(arm):
    found = arm.differences("avx2\nD=1 01\nD=7 02\n", "neon\nD=1 0f\n")
    assert found.splitlines()[:2] == ["--- neon", "+++ avx2"]
    assert {"-D=1 0f", "+D=1 01", "+D=7 02"} <= set(found.splitlines())


@pytest.mark.parametrize("here", ["avx2\n", "baseline\nD=1 01\n"], ids=["no case", "no fma"])
def test_what_need_not_agree_is_no_success(arm, here):
    with pytest.raises(ValueError, match="cannot be compared"):
        arm.differences(here, here)


def test_the_cases_that_run_are_of_every_form_type_and_length(arm):
    lengths = (2, 4, 5, 8, 9)  # of the loops over them in csrc/tests
    assert all(arm.STRIDE % length and length % arm.STRIDE for length in lengths)
    assert all(arm.STRIDE % divisor for divisor in range(2, arm.STRIDE))
