import json
import subprocess
import sys
import typing
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
        ("--help", "demo | train | report | bench | doctor"),
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
    program = """
import runpy, sys
sys.argv = ["guard_ops", "train", "--help"]
try:
    runpy.run_module("guard_ops", run_name="__main__", alter_sys=True)  # python -m guard_ops
except SystemExit as stop:
    assert stop.code == 0
"""
    assert "RECIPE" in fresh.run(program, folder=ROOT)


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    assert "required" in capsys.readouterr().err


def test_only_the_recipe_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train"])
    assert capsys.readouterr().err.endswith("arguments are required: RECIPE\n")


def test_objectives_offered_are_those_of_the_job():
    from guard_ops.digits.jobs import OBJECTIVES
    from guard_ops.recipes.config import DigitsRecipe

    offered = typing.get_args(typing.get_type_hints(DigitsRecipe)["objective"])
    assert set(offered) == set(OBJECTIVES)


def test_recipes_offered_are_those_that_are_shipped(capsys):
    from guard_ops.recipes.resolve import shipped

    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ", ".join(shipped()) in text


def test_settings_stand_on_both_sides_of_an_option():
    options = cli.parse(["train", "digits", "seed=1", "--dry-run", "iterations=2"])
    assert options.settings == ["seed=1", "iterations=2"]
    for words in (["train", "digits", "--resum"], ["demo", "x"]):
        with pytest.raises(SystemExit):
            cli.parse(words)


def test_a_dry_run_of_digits_is_a_recipe(capsys, tmp_path):
    assert cli.main(["train", "digits", "seed=3", "--dry-run"]) == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    assert cli.main(["train", str(tmp_path / "again.yaml"), "--dry-run"]) == 0
    assert "seed: 3\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (["train", "digits", "iterations=0"], "guard-ops: `iterations` is 0; it needs >= 1"),
        (["train", "digits", "learning_rate=-1"], "guard-ops: `learning_rate` is -1.0; it needs"),
        (["train", "digts"], "guard-ops: there is no recipe 'digts'; did you mean digits?"),
        (["demo", "--iterations", "0"], "guard-ops: `--iterations` is 0; it needs >= 1"),
        (["demo", "--seed", "-1"], "guard-ops: `--seed` is -1; it needs >= 0"),
    ],
)
def test_bad_settings_are_one_line_and_happen_before_any_work(options, message, capsys, tmp_path):
    out = tmp_path / "out"
    words = [f"out={out}"] if options[0] == "train" else ["--out", str(out)]
    assert cli.main([*options, *words]) == 1
    assert capsys.readouterr().err.startswith(message)
    assert not out.exists()


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
    assert cli.main(["train", "digits", f"out={tmp_path}"]) == 1
    assert 'pip install "guard-ops[demo]"' in capsys.readouterr().err


def test_doctor_takes_json(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["guard_ops"] == guard_ops.__version__
