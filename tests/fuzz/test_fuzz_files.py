"""Run folders and benchmark files with damage: a clear refusal, an older checkpoint, or all right.

And two processes on one folder, of which one is refused.
"""

import json
import math
import warnings
from pathlib import Path

import damage
import fresh
import pytest
import torch
from attempt import attempt
from hypothesis import given
from hypothesis import strategies as st
from tally import examples, tally
from tiny import tiny_trainer

from benchmarks import compare

RESULTS = Path(compare.__file__).parent / "results" / "cpu-2core.json"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of 6 iterations: its folder, and its weights by iteration."""
    folder = tmp_path_factory.mktemp("run") / "run"
    trainer = tiny_trainer(folder)
    weights = {0: snapshot(trainer)}
    for iteration in (2, 4, 6):
        trainer.config = type(trainer.config)(**(vars(trainer.config) | {"iterations": iteration}))
        trainer.fit(progress=False)
        weights[iteration] = snapshot(trainer)
    closed(trainer)
    return folder, weights


def snapshot(trainer):
    return {name: p.detach().clone() for name, p in trainer.parameters.items()}


def closed(trainer):
    if hasattr(trainer, "close"):
        trainer.close()


def resumed(folder):
    """The trainer, and the warnings that were given; what is refused is raised."""
    with warnings.catch_warnings(record=True) as given_warnings:
        warnings.simplefilter("always")
        trainer = tiny_trainer(folder, resume=True)
    return trainer, [str(w.message) for w in given_warnings]


def is_clear(error, folder):
    """An error of this package, or a ValueError, that names a file or folder of the run."""
    ours = type(error).__module__.startswith("guard_ops") or type(error) is ValueError
    return ours and (str(folder) in str(error) or "`" in str(error))


@examples(share=0.04)
@given(drawn=st.lists(damage.damages(), min_size=1, max_size=3))
def test_a_damaged_run_is_refused_or_continues_from_what_is_whole(run, tmp_path_factory, drawn):
    whole, weights = run
    folder = damage.copy(whole, tmp_path_factory.getbasetemp() / "damaged")
    done = [what for each in drawn if (what := damage.do(folder, each))]
    newest = max(weights)
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    found, refusal = attempt(lambda: resumed(folder))
    if found is None:
        assert is_clear(refusal, folder), f"{done}: {type(refusal).__name__}: {refusal}"
        return tally("damaged runs", "refused")
    trainer, said = found
    try:
        at = trainer.iteration
        assert at in weights, (done, at)
        for name, right in weights[at].items():
            assert torch.equal(trainer.parameters[name], right), (done, at, name)
        assert at == newest or said, f"{done}: from {at} instead of {newest} in silence"
        metrics = (folder / "metrics.jsonl").read_text().splitlines()
        changed = [what for what in done if "metrics.jsonl" in what]
        assert metrics == lines[:at] or (changed and said), (done, metrics, said)
    finally:
        closed(trainer)
    return tally("damaged runs", "continued" if at == newest else "from an older checkpoint")


def some_rows():
    """A file of --json that is small enough to be changed a thousand times."""
    saved = json.loads(RESULTS.read_text())
    rows = saved["ops"]["rows"]
    case = rows[0]["case"]
    return {"ops": saved["ops"] | {"rows": [row for row in rows if row["case"] == case]}}


def read(path, environment):
    old = compare.load(path)
    compare.check_machine(old, environment)
    return old


@examples(share=0.04)
@given(
    drawn=st.lists(
        damage.damages(("flip", "truncate", "empty", *damage.JSON)), min_size=1, max_size=2
    )
)
def test_a_damaged_benchmark_is_refused_or_its_verdicts_are_numbers(tmp_path_factory, drawn):
    path = tmp_path_factory.getbasetemp() / "benchmark" / "results.json"
    path.parent.mkdir(exist_ok=True)
    right = some_rows()
    path.write_text(json.dumps(right, indent=1))
    done = [what for each in drawn if (what := damage.do(path.parent, each))]
    environment = right["ops"]["environment"]
    old, refusal = attempt(lambda: read(path, environment))
    if old is None:
        assert isinstance(refusal, ValueError), (done, refusal)
        assert "cannot compare" in str(refusal), (done, refusal)
        return tally("damaged benchmarks", "refused")
    verdicts = compare.verdicts(old.get("ops", {"rows": []})["rows"], right["ops"]["rows"])
    for verdict in verdicts:
        assert math.isfinite(verdict.change), (done, verdict)
        assert math.isfinite(verdict.threshold), (done, verdict)
        assert verdict.threshold >= 0, (done, verdict)
    return tally("damaged benchmarks", "read")


RESUME = """
import sys, time
sys.path[:0] = sys.argv[2:4]
from tiny import tiny_trainer
try:
    trainer = tiny_trainer(sys.argv[1], resume=True)
except Exception as error:
    print("refused", type(error).__module__, error)
else:
    print("continues at", trainer.iteration)
"""


def test_of_two_processes_on_one_folder_the_second_is_refused(run, tmp_path):
    whole, _ = run
    folder = damage.copy(whole, tmp_path / "shared")
    trainer, _ = resumed(folder)
    paths = [str(Path(__file__).parents[1] / "trainer"), str(Path(__file__).parents[2])]
    said = fresh.run(RESUME, str(folder), *paths)
    assert said.startswith("refused guard_ops")
    assert str(folder) in said
    trainer.close()
    assert fresh.run(RESUME, str(folder), *paths).startswith("continues at 6")
