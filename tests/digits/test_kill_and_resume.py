"""The script behind ``make kill-test``: when it ends, and what it leaves."""

import importlib
import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script, whose runs are made of nothing, and whose folders are in ``tmp_path``."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    script = importlib.import_module("kill_and_resume")
    monkeypatch.setattr(script, "uninterrupted", lambda out: script.Pace(1.0, 2.0))
    return script


def test_equal_runs_are_counted_until_there_are_enough_kills_and_deleted(
    script, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(
        script, "one_run", lambda root, run, *_: script.Outcome(run, ["saving", "training"], [])
    )
    assert script.main(["--kills", "5", "--jobs", "1"]) == 0
    *_, first, second, third, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in (first, second, third)] == ["1", "2", "3"]
    assert last.startswith("3 runs, 6 kills (0 starting, 0 pretraining, 3 training, 3 saving)")
    assert list(tmp_path.iterdir()) == []


def test_a_fault_before_the_first_kill_ends_it_and_keeps_the_evidence(
    script, monkeypatch, tmp_path, capsys
):
    begun = []

    def one_run(root, run, *_):
        begun.append(run)
        return script.Outcome(run, [], ["exit status 1: no such module"])

    monkeypatch.setattr(script, "one_run", one_run)
    assert script.main(["--kills", "5", "--jobs", "1"]) == 1
    assert begun == [1]
    [kept] = tmp_path.iterdir()
    out = capsys.readouterr().out
    assert "   1      0 " in out
    assert "1 RUNS DIFFER" in out
    assert out.endswith(f"what the runs have left is kept: {kept}\n")


def test_a_checkpoint_that_is_never_begun_is_a_fault(script, monkeypatch, tmp_path):
    class Process:
        def poll(self):
            return None

        def kill(self):
            pass

        def wait(self):
            return -9

    class Moments:
        uniform = staticmethod(lambda low, high: low)
        random = staticmethod(lambda: 0.0)  # the kill is to come while a checkpoint is written

    monkeypatch.setattr(script, "start", lambda out: Process())
    monkeypatch.setattr(script, "wait_for_work", lambda process, out: True)
    monkeypatch.setattr(script, "PATIENCE", 0.0)
    outcome = script.one_run(tmp_path, 7, Moments, script.Pace(1.0, 2.0))
    assert outcome == (7, [], ["no checkpoint was begun in 0 s"])


@pytest.mark.parametrize("option", ["--kills", "--jobs"])
def test_nothing_to_do_is_refused(script, option, capsys):
    with pytest.raises(SystemExit):
        script.main([option, "0"])
    assert f"argument {option}: 0; it needs >= 1" in capsys.readouterr().err
