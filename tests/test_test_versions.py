"""The suite under other versions: which pairs, what is run in each, and what the table says."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def versions(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield importlib.import_module("test_versions")
    sys.modules.pop("test_versions", None)


def machine(versions, monkeypatch, answers):
    """A machine on which a command that has a word of ``answers`` gives (status, output)."""
    asked = []

    def run(words, **options):
        asked.append(words)
        status, text = next((a for word, a in answers.items() if word in words), (0, ""))
        return subprocess.CompletedProcess(words, status, text)

    monkeypatch.setattr(versions.shutil, "copytree", lambda *_, **__: None)
    monkeypatch.setattr(versions.subprocess, "run", run)
    return asked


def test_the_oldest_are_what_is_required_at_least(versions):
    assert versions.pairs(["oldest", "newest", "torch==2.10.0 triton"]) == [
        "torch==2.9.* triton==3.5.*",
        "torch triton",
        "torch==2.10.0 triton",
    ]


def test_each_pair_is_installed_and_kept_and_tested(versions, monkeypatch, capsys):
    answers = {
        "pytest": (0, "....\n4 passed, 1 skipped in 3.21s\n"),
        versions.INSTALLED: (0, "2.9.1+cpu 3.5.1\n"),
    }
    asked = machine(versions, monkeypatch, answers)
    assert versions.main(["oldest", "--", "-k", "schedule"]) == 0
    assert (
        capsys.readouterr()
        .out.splitlines()[2]
        .startswith("| torch==2.9.* triton==3.5.* | 2.9.1+cpu, 3.5.1 | 4 passed, 1 skipped | ")
    )
    _, first, second, _, tests = asked
    assert first[-2:] == ["torch==2.9.*", "triton==3.5.*"]
    assert second[-3:] == [".[dev]", "torch==2.9.*", "triton==3.5.*"]
    assert tests[-2:] == ["-k", "schedule"]


@pytest.mark.parametrize(
    "answers, said",
    [
        ({"pytest": (1, "F\n1 failed, 3 passed in 2s\n")}, "FAILED: 1 failed, 3 passed"),
        ({"pytest": (4, "ERROR: not found\n")}, "FAILED: pytest ended with 4"),
        ({"--no-build-isolation": (1, "guard-ops: no C++ compiler")}, "FAILED: not installed"),
    ],
)
def test_what_fails_is_in_the_table_and_the_status(answers, said, versions, monkeypatch, capsys):
    machine(versions, monkeypatch, answers)
    assert versions.main(["newest", "oldest"]) == 1
    out, error = capsys.readouterr()
    assert out.count(said) == 2
    assert next(iter(answers.values()))[1].strip() in error
