"""--help of the scripts that compile, or write into the checkout: it does neither."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["arm", "sanitizers", "life_of_a_call", "inspect_wheel"])
def test_help_is_all_that_happens(name, tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), "--help"]
    asked = subprocess.run(
        command, cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True, check=True
    )
    assert asked.stdout.startswith(f"usage: {name}.py")
    assert asked.stderr == ""
