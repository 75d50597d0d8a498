"""What a run's continuation must share with it, and that what is refused changes nothing."""

import hashlib
import json
import warnings

import pytest
import torch
from tiny import TinyPolicy, full_disk, reward, tiny_trainer

import guard_ops as go
from guard_ops.trainer import (
    CheckpointError,
    RunFolderError,
    batches,
    checkpoint,
    optimizers,
    state,
)
from guard_ops.trainer.folder import FolderLock
from guard_ops.trainer.metrics import MetricsWriter, read_metrics


def run(out, **changes):
    """A run to its end, whose folder others may use then."""
    trainer = tiny_trainer(out, **changes)
    trainer.fit(progress=False)
    trainer.close()
    return trainer


def files(folder):
    """Contents and times of everything in a folder but the lock, which says who had it last."""
    return {
        path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in folder.rglob("*")
        if path.name != "run.lock"
    }


def numbers(out):
    return [{k: v for k, v in x.items() if k != "seconds"} for x in read_metrics(out)]


def adamw(parameters, rate):
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)


def with_optimizer(out, rate, **changes):
    return tiny_trainer(out, optimizer=lambda parameters: adamw(parameters, rate), **changes)


def other_base():
    policy = TinyPolicy()
    with torch.no_grad():
        policy.base.weight[3, 3] += 1.0
    return policy


def half():
    return TinyPolicy().bfloat16()


def another_latent():
    policy = TinyPolicy()
    policy.latent_shape = (3, 2)
    return policy


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": ["0", "2", "1"]}, r"`prompts.values` is '\w{64}' but the run"),
        ({"prompts": ["0", "1"]}, r"`prompts.count` is 2 but the run in `out` was .* 3"),
        ({"metadata": [{"x": 1}, {}, {}]}, r"`prompts.values` is '\w{64}' but the run"),
        ({"policy": other_base()}, "`policy.frozen_parameters` is "),
        (
            {"policy": another_latent()},
            r"`policy.latent_shape` is \[3, 2\] but the run .* \[2, 3\]",
        ),
        (
            {"policy": half()},
            "`policy` has parameter .* in torch.bfloat16 but the checkpoint .* in",
        ),
        ({"recipe": {"model": "b"}}, "`recipe.model` is 'b' but the run in `out` was .* 'a'"),
        ({"recipe": {}}, "`recipe.model` is None but the run in `out` was trained with 'a'"),
        ({"learning_rate": 0.5}, "`config.learning_rate` is 0.5 but the run in `out` was .* 0.01"),
        ({"iterations": 8}, None),
    ],
)
def test_what_a_continuation_must_share_is_refused_by_name(tmp_path, change, message):
    recipe = {"model": "a"}
    run(tmp_path, recipe=recipe, iterations=2)
    before = files(tmp_path)
    if message is None:
        assert run(tmp_path, recipe=recipe, resume=True, **change).iteration == 8
        return
    settings = {"recipe": recipe, "iterations": 2} | change
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, resume=True, **settings)
    assert files(tmp_path) == before


def test_another_learning_rate_of_an_own_optimizer_is_refused(tmp_path):
    with_optimizer(tmp_path, 1e-2, iterations=2).fit(progress=False)
    with pytest.raises(ValueError, match=r"`optimizer.lr` is 0\.1 but the run in `out` .* 0\.01"):
        with_optimizer(tmp_path, 1e-1, resume=True)


def test_a_learning_rate_that_was_changed_while_training_is_continued(tmp_path):
    """A schedule of the learning rate is the run's own; setting it on the trainer is explicit."""
    trainer = with_optimizer(tmp_path, 1e-2, iterations=2)
    trainer.optimizer.param_groups[0]["lr"] = 5e-3
    trainer.fit(progress=False)
    trainer.close()
    again = with_optimizer(tmp_path, 1e-2, resume=True)
    assert again.optimizer.param_groups[0]["lr"] == 5e-3


def test_a_tensor_as_learning_rate_is_saved_and_continued_to_the_same_bits(tmp_path):
    def rate():
        return torch.tensor(1e-2)

    whole = with_optimizer(tmp_path / "whole", rate())
    whole.fit(progress=False)
    with_optimizer(tmp_path / "parts", rate(), iterations=4).fit(progress=False)
    again = with_optimizer(tmp_path / "parts", rate(), resume=True)
    assert isinstance(again.optimizer.param_groups[0]["lr"], torch.Tensor)
    assert again.optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    again.fit(progress=False)
    for name, p in again.parameters.items():
        assert torch.equal(p, whole.parameters[name])
    again.close()
    with pytest.raises(ValueError, match=r"`optimizer.lr` is 0\.1"):
        with_optimizer(tmp_path / "parts", torch.tensor(0.1), resume=True)


def test_a_setting_that_json_cannot_hold_is_named():
    optimizer = adamw(TinyPolicy().parameters(), 1e-2)
    optimizer.param_groups[0]["schedule"] = reward
    with pytest.raises(TypeError, match=r"function reward .* cannot be saved as JSON"):
        optimizers.settings(optimizer)


def test_a_folder_with_checkpoints_is_left_as_it_is(tmp_path):
    run(tmp_path, iterations=2)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"continue it with `resume=True` or choose another"):
        tiny_trainer(tmp_path)
    assert files(tmp_path) == before


def test_refused_settings_do_not_set_damaged_checkpoints_aside(tmp_path):
    trainer = run(tmp_path)
    (trainer.checkpoints / "iteration-000006" / "manifest.json").write_text("{}")
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"`config.seed`"):
        tiny_trainer(tmp_path, resume=True, seed=3)
    assert files(tmp_path) == before


def test_first_weights_are_set_once_and_before_the_first_checkpoint(tmp_path):
    policy, calls = TinyPolicy(), []

    def initialize():
        calls.append(1)
        with torch.no_grad():
            policy.correction.weight.fill_(0.25)

    trainer = tiny_trainer(tmp_path, policy=policy, initialize=initialize)
    name = "correction.weight"
    first = checkpoint.load(trainer.checkpoints / "iteration-000000").tensors
    for tensors in (first["model"], first["ema"], trainer.ema.average):
        assert (tensors[name] == 0.25).all()
    trainer.close()
    tiny_trainer(tmp_path, resume=True, initialize=initialize)
    assert calls == [1]


def test_a_checkpoint_inside_applied_holds_the_weights(tmp_path):
    trainer = tiny_trainer(tmp_path, checkpoint_every=0)
    trainer.fit(progress=False)
    expected = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    with trainer.ema.applied():
        folder = trainer.save()
    saved = checkpoint.load(folder).tensors
    for name, p in expected.items():
        assert torch.equal(saved["model"][name], p)
        assert torch.equal(saved["ema"][name], trainer.ema.average[name])
        assert not torch.equal(saved["ema"][name], p)


@pytest.mark.parametrize("train", ["fit", "iterate"])
def test_training_inside_applied_is_refused_and_changes_no_weight(tmp_path, train):
    trainer = tiny_trainer(tmp_path, checkpoint_every=0)
    trainer.iterate()
    expected = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    with trainer.ema.applied():
        trainer.loop.rollout(trainer.loop.draw(0))  # samples of the average are welcome
        with pytest.raises(RuntimeError, match="train outside of that block"):
            getattr(trainer, train)()
    for name, p in trainer.parameters.items():
        assert torch.equal(p, expected[name])


@pytest.mark.parametrize("samples, minibatches", [(6, 4), (10, 9), (10, 3), (4, 4)])
def test_a_pass_has_as_many_updates_as_minibatches_and_they_are_even(
    tmp_path, samples, minibatches
):
    trainer = tiny_trainer(
        tmp_path,
        guard=go.GuardConfig.flow_grpo(),
        group_size=samples // 2,
        minibatches=minibatches,
        checkpoint_every=0,
    )
    found = batches.minibatches(trainer.loop.shares, 0, trainer.config, 0, torch.device("cpu"))
    sizes = [len(batch.rows) for batch in found]
    for epoch in range(2):
        seen = torch.cat([b.rows for b in found[epoch * minibatches : (epoch + 1) * minibatches]])
        assert torch.equal(seen.sort().values, torch.arange(samples))
    trainer.iterate()
    assert len(sizes) == 2 * minibatches
    assert sum(sizes) == 2 * samples
    assert max(sizes) - min(sizes) <= 1


def cut_a_line(path):
    path.write_bytes(path.read_bytes()[:-20])


def cut_lines(path):
    path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:2]))


def edit(path):
    path.write_bytes(path.read_bytes().replace(b'"iteration": 1,', b'"iteration": 7,'))


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut_a_line, "metrics.jsonl is kept as metrics.jsonl.aside: it is cut off; written again"),
        (cut_lines, "metrics.jsonl is kept as metrics.jsonl.aside: it is cut off; written again"),
        (edit, "metrics.jsonl is kept as metrics.jsonl.aside: it was changed; written again"),
        (lambda path: path.unlink(), "metrics.jsonl is gone; written again from the checkpoint, 4"),
        (lambda path: path.write_bytes(b""), "metrics.jsonl is gone; written again from the che"),
    ],
)
def test_metrics_that_are_not_the_checkpoints_are_mended_with_a_warning(tmp_path, damage, message):
    run(tmp_path / "whole")
    run(tmp_path / "parts", iterations=4)
    path = tmp_path / "parts" / "metrics.jsonl"
    damage(path)
    damaged = path.read_bytes() if path.exists() else b""
    with pytest.warns(RuntimeWarning, match=message) as caught:
        run(tmp_path / "parts", resume=True)
    assert len(caught) == 1
    assert numbers(path) == numbers(tmp_path / "whole" / "metrics.jsonl")
    aside = path.with_name("metrics.jsonl.aside")
    assert aside.exists() == bool(damaged)
    assert not damaged or aside.read_bytes() == damaged


def test_metrics_of_a_run_without_checkpoints_are_not_overwritten(tmp_path):
    run(tmp_path, iterations=2, checkpoint_every=0)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.warns(RuntimeWarning, match="kept as metrics.jsonl.aside: it is of another run"):
        run(tmp_path, iterations=3, checkpoint_every=0)
    with pytest.warns(RuntimeWarning, match="kept as metrics.jsonl.aside-2: it is of another run"):
        run(tmp_path, iterations=1)
    assert (tmp_path / "metrics.jsonl.aside").read_bytes() == before
    assert len(read_metrics(tmp_path / "metrics.jsonl.aside-2")) == 3


def test_lines_after_the_first_checkpoint_are_cut_off_without_a_word(tmp_path):
    """A run killed between its first line and its second checkpoint goes on from iteration 0."""
    trainer = tiny_trainer(tmp_path)
    trainer.writer.write(1, {"reward": 0.0})
    trainer.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path, resume=True)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 6
    assert not (tmp_path / "metrics.jsonl.aside").exists()


def resigned(path, change):
    """Change a checkpoint's state.json, and its manifest so that all the sums are right."""
    state = json.loads((path / "state.json").read_text())
    change(state)
    text = json.dumps(state).encode()
    (path / "state.json").write_bytes(text)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"]["state.json"] = {
        "bytes": len(text),
        "sha256": hashlib.sha256(text).hexdigest(),
    }
    manifest["sha256"] = checkpoint._digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("optimizer"),
        lambda state: state.update(settings=[]),
        lambda state: state["settings"].update(guard=3),
        lambda state: state.update(ema_updates="many"),
        lambda state: state.update(metrics=None),
        lambda state: state["optimizer"].update(param_groups=[3]),
        lambda state: state["optimizer"].update(param_groups=[{"params": ["x"]}]),
        lambda state: state["optimizer"]["state"].pop("0"),
        lambda state: state["optimizer"].update(state=None),
    ],
)
def test_a_state_of_the_wrong_types_is_set_aside(tmp_path, change):
    trainer = run(tmp_path, iterations=4)
    resigned(trainer.checkpoints / "iteration-000004", change)
    with pytest.warns(RuntimeWarning, match="iteration-000004 does not hold the state of a run: "):
        assert tiny_trainer(tmp_path, resume=True).iteration == 2


def test_two_trainers_of_one_folder_are_one_too_many(tmp_path):
    first = tiny_trainer(tmp_path)
    before = files(tmp_path)
    with pytest.raises(RunFolderError, match=r"is in use by process \d+ on .*; wait until that"):
        tiny_trainer(tmp_path, resume=True)
    assert files(tmp_path) == before
    first.close()
    second = tiny_trainer(tmp_path, resume=True)
    second.close()
    with pytest.raises(ValueError, match=r"`config.seed`"):
        tiny_trainer(tmp_path, resume=True, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path, resume=True)  # a refusal has not kept the folder


def test_a_disk_that_fills_up_ends_in_one_sentence_and_the_run_continues_later(tmp_path):
    expected = run(tmp_path / "whole")
    trainer = run(tmp_path / "parts", iterations=4)
    size = (tmp_path / "parts" / "metrics.jsonl").stat().st_size
    trainer = tiny_trainer(tmp_path / "parts", resume=True)
    with full_disk(size + 10), pytest.raises(RunFolderError, match=r"^cannot write .*metrics\.js"):
        trainer.fit(progress=False)
    trainer.close()
    again = run(tmp_path / "parts", resume=True)
    for name, p in expected.parameters.items():
        assert torch.equal(p, again.parameters[name])
    assert numbers(tmp_path / "parts" / "metrics.jsonl") == numbers(
        tmp_path / "whole" / "metrics.jsonl"
    )


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match=r"^cannot write .*/file"):
        tiny_trainer(tmp_path / "file" / "run")
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(RunFolderError, match=r"^cannot write .*/metrics\.jsonl: Is a directory"):
        tiny_trainer(tmp_path / "run")


def test_when_every_checkpoint_is_damaged_it_is_an_error_that_names_them(tmp_path):
    trainer = run(tmp_path, iterations=4)
    for folder in trainer.checkpoints.iterdir():
        (folder / "manifest.json").write_text("{}")
    before = files(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"no intact checkpoint to resume from: .*000004.*0002"
    ):
        tiny_trainer(tmp_path, resume=True)
    assert files(tmp_path) == before


def test_a_trainer_that_fails_at_its_beginning_leaves_no_file_open(tmp_path, monkeypatch):
    def save(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(state, "save", save)
    files = []
    start = MetricsWriter.start
    monkeypatch.setattr(
        MetricsWriter, "start", lambda self, *a: start(self, *a) or files.append(self._file)
    )
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(tmp_path)
    assert [file.closed for file in files] == [True]
    FolderLock(tmp_path).release()
