"""scripts/sanitize.py: what is run under which tool, for how long, and what a finding does."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def sanitize(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    for name in ("sanitize", "bounded"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("sanitize")
    for name in ("sanitize", "bounded"):
        sys.modules.pop(name, None)


def test_every_tool_looks_at_both_backends(sanitize):
    command = sanitize.Run("triton", "racecheck").command("/opt/compute-sanitizer")
    assert command[:3] == ["/opt/compute-sanitizer", "--tool", "racecheck"]
    assert command[-3:] == ["--calls", "triton", "tiny"]
    assert "--kernel-name" not in command
    command = sanitize.Run("cuda", "memcheck").command("/opt/compute-sanitizer")
    assert "kns=guard_ops" in command
    assert command[-1] == "small"
    ports = [
        command[command.index("--port") + 1]
        for backend in sanitize.BACKENDS
        for tool in sanitize.TOOLS
        if (command := sanitize.Run(backend, tool).command(""))
    ]
    assert len(set(ports)) == 8
    # Its writes by torch would not be seen, and every input be reported as never written.
    assert "--kernel-name" not in sanitize.Run("cuda", "initcheck").command("")
    assert sanitize.Run("cuda", None).command("")[-3:] == ["--calls", "cuda", "small"]


def test_a_finding_and_a_run_without_end_are_failures(sanitize, capsys):
    answers = {"memcheck": (0, "quiet"), "racecheck": (1, "a hazard"), "synccheck": (None, "begun")}
    asked = []

    def start(command, seconds, folder, environment, output):
        asked.append((seconds, environment["GUARD_OPS_BACKEND"]))
        assert environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        return answers[command[2]]

    runs = [sanitize.Run("triton", tool) for tool in answers]
    assert sanitize.run_all(runs, "tool", 40.0, start) == (runs[1:], [])
    assert asked == [(40.0, "triton")] * 3
    text = capsys.readouterr().out
    assert "memcheck on triton: clean" in text
    assert "racecheck on triton: status 1\n  a hazard" in text
    assert "synccheck on triton: not ended after 40 s\n  begun" in text
    assert "quiet" not in text


def test_a_tool_that_is_refused_the_device_has_found_nothing(sanitize, capsys):
    words = "========= Error: Device not supported. Please refer to the documentation"
    runs = [sanitize.Run("cuda", tool) for tool in (None, "memcheck")]
    found = sanitize.run_all(runs, "tool", 40.0, lambda *_, **__: (1, words))
    assert found == (runs[:1], runs[1:])  # the calls alone have no tool that could be refused
    assert "memcheck on cuda: not run, the tool is refused the device" in capsys.readouterr().out


@pytest.fixture
def machine(sanitize, monkeypatch):
    """A GPU and the tool; what ``run_all`` was given, and which of it is to fail or be refused."""
    import torch

    import guard_ops as go

    seen, failing = [], []

    def run_all(runs, tool, seconds):
        seen.append((list(runs), seconds))
        refused = [run for run in runs if "refused" in failing and run.tool]
        return [run for run in runs if run in failing], refused

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(go, "available_backends", lambda: ("cuda", "triton", "reference"))
    monkeypatch.setattr(sanitize, "sanitizer", lambda: "tool")
    monkeypatch.setattr(sanitize, "run_all", run_all)
    return seen, failing


def test_all_of_it_fits_the_time(sanitize, machine):
    seen, _ = machine
    assert sanitize.main(["--seconds", "100"]) == 0
    (alone, first), (tools, second), (others, third) = seen
    assert [run.tool for run in alone] == [None, None]
    assert {run.tool for run in tools} == {"memcheck", "racecheck"}
    assert {run.tool for run in others} == {"initcheck", "synccheck"}
    assert len(set(tools + others)) == 2 * 4
    assert first == 40
    # counted from the start
    assert 0 < third <= second <= 100 - 2 * sanitize.bounded.GRACE_SECONDS


def test_what_has_no_time_left_or_no_device_is_not_run_and_is_no_finding(
    sanitize, machine, capsys, monkeypatch
):
    seen, failing = machine
    failing.append("refused")
    assert sanitize.main(["--seconds", "100"]) == sanitize.NOT_RUN
    text = capsys.readouterr().out
    assert "not run, refused the device: initcheck on cuda, synccheck on cuda" in text
    assert "clean: nothing" in text
    assert len(seen) == 2

    failing.clear()
    seen.clear()
    clock = iter([0.0, 40.0, 85.0])
    monkeypatch.setattr(sanitize.time, "monotonic", lambda: next(clock))
    assert sanitize.main(["--seconds", "100"]) == 0
    assert seen[1][1] == 50.0
    text = capsys.readouterr().out
    assert "not run, no time left: initcheck on cuda, synccheck on cuda" in text
    assert "sanitize: clean: memcheck on cuda, racecheck on cuda, memcheck on triton" in text


def test_what_does_not_run_alone_is_not_run_under_a_tool(sanitize, machine, capsys):
    seen, failing = machine
    failing.append(sanitize.Run("cuda", None))
    assert sanitize.main([]) == 1
    assert {run.backend for run in seen[1][0]} == {"triton"}
    text = capsys.readouterr().out
    assert "not under any tool: cuda" in text
    assert "failed: the calls alone on cuda" in text


def test_without_the_tool_it_says_so(sanitize, machine, capsys, monkeypatch):
    seen, _ = machine
    monkeypatch.setattr(sanitize, "sanitizer", lambda: None)
    assert "not on PATH" in sanitize.missing()
    assert sanitize.main([]) == 0
    assert sanitize.missing() in capsys.readouterr().out
    assert seen == []


def test_without_a_gpu_nothing_is_run(sanitize, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sanitize.main([]) == 0
    assert "nothing was run" in capsys.readouterr().out
