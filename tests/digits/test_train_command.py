"""``guard-ops train digits``: what it refuses and says, in the words of the command line."""

import os
import shlex

import pytest

from guard_ops import cli
from guard_ops.digits import jobs
from guard_ops.digits.judges import Gold, ProxyReward
from guard_ops.digits.policy import load_digits
from guard_ops.trainer.folder import FolderLock
from guard_ops.trainer.metrics import read_metrics

SHORT = ["pretrain_steps=2", "checkpoint_every=1", "evaluate_every=100"]


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """Judges are fitted once, and see two samples of a class: this is about what is printed."""
    digits = load_digits()
    judges = {"ProxyReward": ProxyReward(digits), "Gold": Gold(digits)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "EVALUATION_SAMPLES", 2)
        for name, judge in judges.items():
            patch.setattr(jobs, name, lambda digits, judge=judge: judge)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 2 iterations."""
    out = tmp_path_factory.mktemp("train") / "run"
    assert cli.main(["train", "digits", f"out={out}", "iterations=2", *SHORT]) == 0
    return out


def files(folder):
    return {
        path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in folder.rglob("*")
        if path.name != "run.lock"  # says who had the folder last
    }


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "`out` is '{out}', which has checkpoints of another run; continue it with "
             "`resume=true` or choose another folder"),
        (["resume=true", "seed=1"], "`seed` is 1 but the run in `out` was trained with 0; "
                                    "resume with the same or choose another `out`"),
        (["resume=true", "learning_rate=1e-3"], "`learning_rate` is 0.001 but the run in "
                                                "`out` was trained with 0.0004; "),
        (["resume=true", "objective=paper"], "`objective` is 'paper' but the run in `out` "
                                             "was trained with 'article'; "),
        (["resume=true", "pretrain_steps=3"], "`pretrain_steps` is 3 but the run in `out` "
                                              "was trained with 2; "),
        (["resume=true", "learning_rate=0"], "`learning_rate` is 0.0; it needs > 0"),
        (["resume=true", "checkpoint_every=-1"], "`checkpoint_every` is -1; it needs >= 0"),
    ],
)  # fmt: skip
def test_a_refusal_is_in_the_words_of_the_command_line_and_touches_nothing(
    trained, options, message, capsys, monkeypatch
):
    monkeypatch.setattr(jobs, "pretrained", lambda *_: pytest.fail("it pretrains"))
    before = files(trained)
    given = ["train", "digits", f"out={trained}", "iterations=3", *SHORT, *options]
    assert cli.main(given) == 1
    assert capsys.readouterr().err.startswith("guard-ops: " + message.format(out=trained))
    assert files(trained) == before


def test_another_pretrained_file_is_neither_used_nor_replaced(trained, tmp_path, capsys):
    path = tmp_path / "pretrained.safetensors"
    path.write_bytes((trained / path.name).read_bytes())
    before = path.read_bytes()
    assert cli.main(["train", "digits", f"out={tmp_path}", *SHORT, "pretrain_steps=3"]) == 1
    message = f"guard-ops: `pretrain_steps` is 3 but {path} was made with 2; continue with the"
    assert capsys.readouterr().err.startswith(message)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, "run.lock"]


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_run_that_has_come_so_far_says_where_it_is(trained, iterations, capsys):
    given = ["train", "digits", f"out={trained}", *SHORT, f"iterations={iterations}", "resume=true"]
    assert cli.main(given) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"the run in {trained} is at iteration 2 already; it goes on with `iterations` above "
        f"that, not {iterations}"
    )
    assert len(lines) == 2


def test_a_recipe_of_yours_in_the_folder_is_kept(tmp_path):
    (tmp_path / "recipe.yaml").write_text("# mine\nkind: digits\n")
    given = ["train", "digits", f"out={tmp_path}", *SHORT, "iterations=1"]
    with pytest.warns(RuntimeWarning, match="recipe.yaml is kept as recipe.yaml.aside"):
        assert cli.main(given) == 0
    assert (tmp_path / "recipe.yaml.aside").read_text() == "# mine\nkind: digits\n"
    assert "pretrain_steps: 2\n" in (tmp_path / "recipe.yaml").read_text()


def test_the_monitor_of_a_run_is_resumed_to_the_same_readings(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = [*SHORT, "evaluate_every=1"]
    assert cli.main(["train", "digits", f"out={whole}", *words, "iterations=3"]) == 0
    assert cli.main(["train", "digits", f"out={parts}", *words, "iterations=2"]) == 0
    again = [*words, "iterations=3", "resume=true"]
    assert cli.main(["train", "digits", f"out={parts}", *again]) == 0
    assert (whole / "monitor.jsonl").read_bytes() == (parts / "monitor.jsonl").read_bytes()
    line = read_metrics(parts / "metrics.jsonl")[-1]
    assert {"gold_drop", "gold_drop_error", "gap", "over_optimizing"} <= line.keys()
    for kind in ("pictures", "ratios"):
        names = [path.name for path in sorted((parts / kind).iterdir())]
        assert names[-1].startswith("iteration-000003.")


def test_a_folder_in_use_is_one_line(trained, capsys):
    lock = FolderLock(trained)
    try:
        assert cli.main(["train", "digits", f"out={trained}", *SHORT, "resume=true"]) == 1
    finally:
        lock.release()
    error = capsys.readouterr().err
    assert error.startswith(f"guard-ops: {trained} is in use by process ")
    assert error.count("\n") == 1


def interrupt(when):
    def evaluate(*_):
        if when():
            raise KeyboardInterrupt
        return {}

    return evaluate


def test_an_interrupt_says_what_was_saved_and_the_command_that_continues(
    tmp_path, capsys, monkeypatch
):
    out = tmp_path / "a run"  # a name that a shell needs quoted
    given = ["train", "digits", f"out={out}", *SHORT, "evaluate_every=2", "iterations=3"]
    judge = jobs.judge
    with monkeypatch.context() as patch:
        # the monitor's first reading is of the start
        patch.setattr(jobs, "judge", lambda *a: interrupt(lambda: a[-1] > 0)() or judge(*a))
        assert cli.main(given) == 130
    text = capsys.readouterr().err
    assert f"interrupted; saved until now: {out}/checkpoints/iteration-000001. To con" in text
    command = shlex.split(text.splitlines()[-1])
    assert command == ["guard-ops", *given, "resume=true"]
    assert cli.main(command[1:]) == 0
    assert "resuming after iteration 1\n" in capsys.readouterr().out
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3


def test_what_was_set_aside_is_nothing_to_continue_from(tmp_path):
    names = "iteration-000001", "iteration-000002.corrupt", "iteration-000002.corrupt-2"
    for seconds, name in enumerate(names):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (seconds, seconds))
    assert f"saved until now: {tmp_path}/iteration-000001. " in cli._how_to_continue(
        tmp_path, ["train"]
    )


def test_messages_are_in_the_words_of_the_command_line():
    options = cli.parse(["train", "digits"])
    message = "`run`, `config.seed`, `resume=True` and `group_size`"
    expected = "`run`, `seed`, `resume=true` and `group_size`"
    assert cli._in_words_of(options, message) == expected
    options = cli.parse(["demo"])
    message = "`run`, `given`, `config.seed`, `iterations` and `group_size`"
    expected = "`run`, `given`, `--seed`, `--iterations` and `group_size`"
    assert cli._in_words_of(options, message) == expected


def test_an_interrupt_before_anything_was_saved_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jobs, "load_digits", interrupt(lambda: True))
    assert cli.main(["train", "digits", f"out={tmp_path}"]) == 130
    assert capsys.readouterr().err == "guard-ops: interrupted; nothing was saved yet\n"


def test_an_interrupted_pretraining_says_where_it_is(tmp_path, capsys, monkeypatch):
    from guard_ops.digits import pretraining

    loss, calls = pretraining.flow_matching_loss, []
    monkeypatch.setattr(
        pretraining,
        "flow_matching_loss",
        lambda *a: interrupt(lambda: len(calls) == 2)() or calls.append(1) or loss(*a),
    )
    assert cli.main(["train", "digits", f"out={tmp_path}", *SHORT, "pretrain_steps=4"]) == 130
    assert f"saved until now: {tmp_path}/pretraining/iteration-000002. " in capsys.readouterr().err
