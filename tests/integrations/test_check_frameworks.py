"""``scripts/check_frameworks.py`` reads a script's loss from its file, and says what it lacks."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"

SCRIPT = """
def main():
    advantages = 5
    for sample in samples:
        with autocast():
            pass
        advantages = sample["advantages"]
        if wide:
            ratio = advantages + 1
        else:
            ratio = advantages + 2
        loss = ratio * 10
        if beta:
            loss = loss + 1
        backward(loss)
"""


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    return importlib.import_module("frameworks.tails"), importlib.import_module("frameworks.stubs")


def test_a_scripts_own_lines_are_run(scripts, tmp_path):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    scope = {"sample": {"advantages": 3}, "wide": False, "beta": True}
    assert scripts[0].original(path, "advantages", "loss", scope)["loss"] == 51


def test_what_is_not_installed_is_stood_in_for_and_said(scripts, tmp_path, monkeypatch):
    (tmp_path / "a_framework.py").write_text(
        "from not_installed.here import Base, decorate\n"
        "class Model(Base):\n    pass\n"
        "@decorate\ndef step():\n    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    stubs = scripts[1].Stubs(("a_framework",))
    sys.meta_path.append(stubs)
    module = importlib.import_module("a_framework")
    assert module.step() == 3
    assert module.Model.__mro__ == (module.Model, object)
    assert stubs.made == ["not_installed", "not_installed.here"]
    with pytest.raises(ImportError):  # for anybody else it is still not there
        importlib.import_module("not_installed.there")
    for name in ("a_framework", "not_installed", "not_installed.here"):
        del sys.modules[name]


def test_checkouts_that_are_missing_are_left_out(tmp_path):
    command = [sys.executable, SCRIPTS / "check_frameworks.py", tmp_path, "flow_grpo"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"flow_grpo: flow_grpo is not in {tmp_path}" in done.stdout
    assert "0 failures" in done.stdout
