"""Regressions: called out beyond the noise, and only then."""

import copy
import json
import random
import re
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch

from benchmarks import cases, command, compare, options, stages, suite
from benchmarks.workloads import CI

ONE = cases.Case(CI.with_batch(1), CI, "guard_loss", "both", "noise", "article", torch.float32)
NAME = "ci guard_loss both noise article float32 on cpu"


def row(contender, milliseconds, noise=0.01, scatter=0.02):
    return {
        "case": "one", "workload": "ci", "op": "guard_loss", "stage": "both", "form": "noise",
        "objective": "article", "dtype": "float32", "shape": [1, 8, 64], "contender": contender,
        "milliseconds": milliseconds, "noise": noise, "scatter": scatter,
    }  # fmt: skip


def run(kernel, copied=1.0, **more):
    return [row("cpu", kernel, **more), row("memory copy", copied), row("eager", 20.0)]


# 5 % plus noise and scatter of both runs: 11 %
@pytest.mark.parametrize(
    "old, new, verdict",
    [
        (run(1.0), run(1.0), "no change"),
        (run(1.0), run(1.1), "no change"),
        (run(1.0), run(1.3), "slower by 30%"),
        (run(1.3), run(1.0), "faster by 23%"),
        (run(1.0), run(2.0, copied=2.0), "no change"),  # the whole machine is slower today
        (run(1.0), run(1.0, copied=0.5), "no change"),  # the copy happened to run fast
        (run(1.0), run(2.0, copied=1.6), "slower by 25%"),
        (run(1.0, scatter=0.5), run(1.3), "no change"),
        (run(1.0), run(1.3, noise=0.4), "no change"),
    ],
)
def test_verdict(old, new, verdict):
    (found,) = compare.verdicts(old, new)
    assert found.name == NAME
    assert str(found) == verdict


def test_only_what_both_runs_timed_on_the_same_shape_is_compared():
    other = [{**r, "shape": [2, 8, 64]} for r in run(9.0)]
    assert compare.verdicts(run(1.0), other) == []
    assert compare.verdicts([], run(9.0)) == []


def test_a_slowdown_counts_only_when_it_is_seen_twice():
    first = compare.verdicts(run(1.0), run(2.0))
    assert [v.slower for v in compare.confirmed(first, compare.verdicts(run(1.0), run(1.02)))] == [
        False
    ]
    (both,) = compare.confirmed(first, compare.verdicts(run(1.0), run(1.8)))
    assert str(both) == "slower by 80%"
    sped_up = compare.verdicts(run(1.0), run(0.4))
    assert str(sped_up[0]) == "faster by 60%"
    (both,) = compare.confirmed(sped_up, compare.verdicts(run(1.0), run(0.5)))
    assert str(both) == "faster by 50%"
    (once,) = compare.confirmed(sped_up, compare.verdicts(run(1.0), run(1.9)))
    assert str(once) == "no change"


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture
def one_case(monkeypatch):
    monkeypatch.setattr(command, "plan", lambda *_: {"ops": [ONE]})


@pytest.fixture
def fake_clock(monkeypatch):
    """``(seconds, factor)`` of each contender; calls take that long, jittering by 2 %."""
    now, jitter = [0.0], random.Random(0)
    speed = {"cpu | noise": 1e-3, "memory copy": 2e-3}
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def takes(name):
        def call():
            now[0] += speed[name] * jitter.gauss(1, 0.02)

        return call

    monkeypatch.setattr(suite, "case_calls", lambda *_: {name: takes(name) for name in speed})
    monkeypatch.setattr(suite.measure, "peak_extra_bytes", lambda *_, **__: 0)
    return speed


def bench(*arguments):
    parser = ArgumentParser()
    options.add_arguments(parser)
    return command.run(parser.parse_args([*map(str, arguments), "--suite", "ops"]))


def test_two_runs_of_the_same_commit_are_no_change(one_case, fake_clock, tmp_path, capsys):
    assert bench("--json", tmp_path / "a.json") == 0
    assert bench("--compare", tmp_path / "a.json") == 0
    assert "no change: 1 kernels within the noise of the two runs" in capsys.readouterr().out


def test_a_slower_kernel_is_called_out_and_fails_the_command(
    one_case, fake_clock, tmp_path, capsys
):
    bench("--json", tmp_path / "a.json")
    fake_clock["cpu | noise"] *= 1.5
    assert bench("--compare", tmp_path / "a.json") == 1
    out = capsys.readouterr().out
    assert f"{NAME}: slower by " in out
    assert "1 slower, 0 faster, 0 no change" in out
    fake_clock["cpu | noise"] /= 3
    assert bench("--compare", tmp_path / "a.json") == 0
    assert f"{NAME}: faster by " in capsys.readouterr().out


@pytest.mark.skipif("cpu" not in suite.choose_backends(None), reason="needs the cpu backend")
def test_a_deliberately_slowed_kernel_is_called_out(one_case, monkeypatch, tmp_path, capsys):
    torch.set_num_threads(1)  # two wait for each other where other work shares the machine
    bench("--backend", "cpu", "--json", tmp_path / "a.json")
    honest = stages.stage_call

    def slowed(case, inputs, backend):
        call = honest(case, inputs, backend)
        return lambda: [call() for _ in range(12)]

    monkeypatch.setattr(stages, "stage_call", slowed)
    assert bench("--backend", "cpu", "--compare", tmp_path / "a.json") == 1
    assert f"{NAME}: slower by " in capsys.readouterr().out


# ---- files that cannot be compared --------------------------------------------------------------


@pytest.mark.parametrize(
    "text, why",
    [
        (None, "No such file"),
        ("{", "Expecting property name"),
        ("[]", "it is no object of sections"),
        ("null", "it is no object of sections"),
        ("{}", "none of the sections workloads, ops"),
        ("[" * 100_000, "it is nested too deeply"),
        ('{"ops": []}', "its section ops has no list of rows"),
        ('{"ops": {"rows": {}}}', "its section ops has no list of rows"),
        ('{"ops": {"rows": []}}', "its section ops does not say on which machine"),
        ('{"ops": {"rows": [[]], "environment": {}}}', "row 0 of ops is no object"),
    ],
)
def test_an_unreadable_file_is_named_with_those_beside_it(text, why, tmp_path):
    (tmp_path / "good.json").write_text("{}")
    path = tmp_path / "old.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"JSON files in .*good\.json") as error:
        compare.load(path)
    assert why in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "field, value, needed",
    [
        ("milliseconds", None, "None; it needs a number > 0"),
        ("milliseconds", "1.0", "'1.0'; it needs a number > 0"),
        ("milliseconds", 0, "0; it needs a number > 0"),
        ("milliseconds", -1.0, "-1.0; it needs a number > 0"),
        ("milliseconds", float("nan"), "nan; it needs a number > 0"),
        ("milliseconds", float("inf"), "inf; it needs a number > 0"),
        ("milliseconds", 10**400, "1000000000"),
        ("milliseconds", True, "True; it needs a number > 0"),
        ("milliseconds", ..., "missing; it needs a number > 0"),
        ("noise", -0.1, "-0.1; it needs a number >= 0"),
        ("scatter", float("nan"), "nan; it needs a number >= 0"),
        ("shape", "8", "'8'; it needs a list of whole numbers > 0"),
        ("shape", [8, 0], "[8, 0]; it needs a list of whole numbers > 0"),
        ("case", 1, "1; it needs a text"),
        ("form", [], "[]; it needs a text"),
        ("workload", ..., "missing; it needs a text"),
    ],
)
def test_a_row_that_cannot_be_compared_is_named(field, value, needed, tmp_path):
    rows = run(1.0)
    rows[1] |= {field: value}
    if value is ...:
        del rows[1][field]
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"ops": {"environment": {}, "rows": rows}}))
    with pytest.raises(ValueError, match="cannot compare with") as error:
        compare.load(path)
    assert f"{path}: {field!r} of row 1 of ops is {needed}" in str(error.value)


@pytest.mark.parametrize("other", [{"contender": "eager"}, {"case": "two"}])
def test_a_kernel_without_its_memory_copy_is_named(other, tmp_path):
    rows = run(1.0)
    rows[1] |= other
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"ops": {"environment": {}, "rows": rows}}))
    with pytest.raises(ValueError, match=f"{path}: row 0 of ops, {NAME}, has no memory copy"):
        compare.load(path)


def test_another_machines_times_are_refused(one_case, fake_clock, tmp_path):
    bench("--json", tmp_path / "a.json")
    saved = json.loads((tmp_path / "a.json").read_text())
    other = copy.deepcopy(saved)
    other["ops"]["environment"]["cores"] = 96
    (tmp_path / "b.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="ops of the earlier run has cores 96, this one"):
        bench("--compare", tmp_path / "b.json")


def unmeasured(*_):
    pytest.fail("it measured first")


def test_nothing_in_common_is_an_error(one_case, fake_clock, monkeypatch, tmp_path):
    bench("--json", tmp_path / "a.json")
    saved = json.loads((tmp_path / "a.json").read_text())
    for found in saved["ops"]["rows"]:
        found["shape"] = [1, 1, 1]
    (tmp_path / "b.json").write_text(json.dumps(saved))
    monkeypatch.setattr(command, "measure", unmeasured)
    with pytest.raises(ValueError, match="timed none of these kernels on these shapes"):
        bench("--compare", tmp_path / "b.json")
    with pytest.raises(ValueError, match="timed none of these kernels on these shapes"):
        bench("--compare", tmp_path / "a.json", "--backend", "reference")


@pytest.mark.parametrize(
    "options, said",
    [
        (["--json", "."], "`--json` is ., a folder; it needs the name of a file"),
        (["--plot", "file"], "`--plot` is file, a file; it needs the name of a folder"),
        (["--compare", "file"], "cannot compare with file: "),
        (["--json", "locked/numbers.json"], "locked cannot be written into"),
        (["--plot", "locked/plots"], "locked cannot be written into"),
    ],
)
def test_what_cannot_be_read_or_written_is_found_out_before_measuring(
    options, said, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir()
    # the superuser, as whom a container's tests run, may write everywhere
    monkeypatch.setattr(command.os, "access", lambda path, _: path != Path("locked"))
    monkeypatch.setattr(command, "measure", unmeasured)
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        bench(*options)


@pytest.mark.parametrize(
    "package, options", [("rich", []), ("matplotlib", ["--plot", "plots"])], ids=["rich", "plots"]
)
def test_a_missing_package_is_found_out_before_measuring(package, options, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(command, "measure", unmeasured)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "guard-ops\[bench\]"'):
        bench(*options)
