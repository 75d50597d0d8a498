import json
import subprocess
import sys
from pathlib import Path

import fresh
import pytest

import guard_ops
from guard_ops import cli

ROOT = Path(__file__).parents[1]


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("demo", "train", "bench", "doctor"))


@pytest.mark.parametrize(
    "word, said",
    [
        ("--help", "demo | train | bench | doctor"),
        ("--version", f"guard-ops {guard_ops.__version__}"),
        ("bench", "--compare FILE"),
    ],
)
def test_what_needs_no_torch_imports_none(word, said):
    """It takes seconds, and longer from a cold disk."""
    program = (
        "import sys, guard_ops_command\n"
        "try:\n    guard_ops_command.main()\n"
        "finally:\n    print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    words = [word] if word.startswith("-") else [word, "--help"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.endswith("False False\n")
    assert said in done.stdout


def test_the_command_runs_the_package_before_the_work():
    """It is the real package then, which every module of it finds complete."""
    program = """
import sys, guard_ops_command
sys.argv = ["guard-ops", "doctor", "--json"]
status = guard_ops_command.main()
import guard_ops, guard_ops.cli
assert guard_ops.guard_loss and guard_ops.cli is sys.modules["guard_ops.cli"]
assert status == 0
"""
    assert json.loads(fresh.run(program, folder=ROOT))["guard_ops"] == guard_ops.__version__


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "guard_ops", "train", "--help"], capture_output=True, check=True
    )
    assert b"--objective {article,paper,flow_grpo}" in done.stdout


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    assert "required" in capsys.readouterr().err


def test_objectives_offered_are_those_of_the_job():
    from guard_ops.digits.jobs import OBJECTIVES

    assert set(cli.OBJECTIVES) == set(OBJECTIVES)


@pytest.mark.parametrize(
    "options, message",
    [
        (["train", "--iterations", "0"], "guard-ops: `--iterations` is 0; it needs >= 1"),
        (["train", "--learning-rate", "-1"], "guard-ops: `--learning-rate` is -1.0; it needs > 0"),
        (["demo", "--iterations", "0"], "guard-ops: `--iterations` is 0; it needs >= 1"),
        (["demo", "--seed", "-1"], "guard-ops: `--seed` is -1; it needs >= 0"),
    ],
)
def test_bad_settings_are_one_line_and_happen_before_any_work(options, message, capsys, tmp_path):
    assert cli.main([*options, "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--workload", "sd9"], "there is no workload 'sd9'; there are ci, sd35_512,"),
        (["--backend", "tpu"], "backend 'tpu' is not available here: "),
        (["--elements", "0"], "`--elements` is 0; it needs >= 1"),
        (["--compare", "none.json"], "cannot compare with none.json: "),
        (["--json", "no/such/folder.json"], "there is no folder no/such to write folder.json"),
    ],
)
def test_a_bench_that_cannot_run_says_what_there_is(options, message, capsys):
    assert cli.main(["bench", *options]) == 1
    assert capsys.readouterr().err.startswith(f"guard-ops: {message}")


def test_a_missing_extra_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "sklearn.datasets", raising=False)
    assert cli.main(["train", "--out", str(tmp_path)]) == 1
    assert 'pip install "guard-ops[demo]"' in capsys.readouterr().err


def test_doctor_takes_json(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["guard_ops"] == guard_ops.__version__
