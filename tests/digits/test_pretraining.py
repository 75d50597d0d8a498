import pytest
import ranks
import torch
from safetensors.torch import load_file, save_file
from tiny import full_disk

from guard_ops.digits import jobs, pretraining
from guard_ops.digits.policy import DigitPolicy, flow_matching_loss, load_digits
from guard_ops.digits.pretraining import load_or_pretrain, pretrain
from guard_ops.trainer import RunFolderError, TrainConfig


class Stop(BaseException):
    """As an interrupt."""


def stop_after(steps):
    def tick(done):
        if done == steps:
            raise Stop

    return tick


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())


def test_pretraining_learns_and_repeats_itself():
    digits, policy = load_digits(), pretrain(seed=0, steps=60, batch=32)

    @torch.no_grad()
    def loss(policy):
        generator = torch.Generator().manual_seed(9)
        return float(flow_matching_loss(policy, digits, 1797, generator))

    # a velocity of 0 costs 1 for the noise and the mean square of the pixels
    untrained = 1 + float(digits.images.square().mean())
    assert loss(DigitPolicy()) == pytest.approx(untrained, rel=0.03)
    assert loss(policy) < 0.75 * untrained
    again = pretrain(seed=0, steps=60, batch=32).state_dict()
    assert all(torch.equal(again[name], p) for name, p in policy.state_dict().items())


def test_pretraining_is_kept_and_a_damaged_file_is_set_aside_with_a_warning(tmp_path):
    path, ticks = tmp_path / "new" / "pretrained.safetensors", []
    first = load_or_pretrain(path, seed=0, steps=3, tick=ticks.append).state_dict()
    assert ticks == [1, 2, 3]
    second = load_or_pretrain(path, seed=0, steps=3, tick=ticks.append).state_dict()
    assert ticks == [1, 2, 3]
    assert same(first, second)
    whole = path.read_bytes()
    kept = [path.name + suffix for suffix in ("", ".corrupt", ".corrupt-2", ".corrupt-3")]
    damages = whole[:1000], whole[:-3] + b"\x00\x00\x00", b""
    for damaged, name in zip(damages, kept[1:], strict=True):
        ticks.clear()
        path.write_bytes(damaged)
        message = rf"pretrained.safetensors is damaged \(.+\); kept as {name}, pretraining again"
        with pytest.warns(RuntimeWarning, match=message):
            again = load_or_pretrain(path, seed=0, steps=3, tick=ticks.append).state_dict()
        assert ticks == [1, 2, 3]
        assert same(first, again)
        assert path.with_name(name).read_bytes() == damaged
    assert sorted(p.name for p in path.parent.iterdir()) == kept


def test_a_file_without_a_sha256_is_kept_as_of_another_version(tmp_path):
    path = tmp_path / "pretrained.safetensors"
    first = load_or_pretrain(path, seed=0, steps=1).state_dict()
    save_file(load_file(path), path, {"seed": "0", "pretrain_steps": "1"})
    before, aside = path.read_bytes(), path.with_name(f"{path.name}.other-version")
    message = rf"it has no SHA-256; kept as {aside.name}, pretraining again"
    with pytest.warns(RuntimeWarning, match=message):
        again = load_or_pretrain(path, seed=0, steps=1).state_dict()
    assert same(first, again)
    assert aside.read_bytes() == before


def test_a_full_disk_leaves_no_half_of_the_file(tmp_path):
    path, weights = tmp_path / "pretrained.safetensors", {"w": torch.zeros(1000)}
    message = r"cannot write .*pretrained\.writing.*; what was saved before is whole"
    with full_disk(1000), pytest.raises(RunFolderError, match=message):
        pretraining._write(path, weights, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"steps": 4}, "`pretrain_steps` is 4 but .*pretrained.safetensors was made with 3"),
        ({"seed": 1}, "`seed` is 1 but .*pretrained.safetensors was made with 0"),
    ],
)
def test_a_file_of_other_settings_is_refused_and_left_alone(tmp_path, changed, message):
    path = tmp_path / "pretrained.safetensors"
    load_or_pretrain(path, seed=0, steps=3)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        load_or_pretrain(path, **{"seed": 0, "steps": 3} | changed)
    assert path.read_bytes() == before


def test_what_was_interrupted_continues_to_the_same_bits(tmp_path):
    ticks = []
    expected = pretrain(0, 12, batch=8).state_dict()
    for stop in (5, 9):
        with pytest.raises(Stop):
            pretrain(0, 12, batch=8, tick=stop_after(stop), checkpoints=tmp_path)
    with pytest.raises(ValueError, match=r"`pretrain_steps` is 13 but .* was made with 12"):
        pretrain(0, 13, batch=8, checkpoints=tmp_path)
    policy = pretrain(0, 12, batch=8, tick=ticks.append, checkpoints=tmp_path)
    assert ticks == [9, 10, 11, 12]
    assert same(policy.state_dict(), expected)


def test_a_damaged_checkpoint_of_it_costs_steps_and_no_more(tmp_path):
    expected, ticks = pretrain(0, 12, batch=8).state_dict(), []
    with pytest.raises(Stop):
        pretrain(0, 12, batch=8, tick=stop_after(9), checkpoints=tmp_path)
    (tmp_path / "iteration-000008" / "state.json").write_text("{}")
    with pytest.warns(RuntimeWarning, match="using the previous checkpoint"), pytest.raises(Stop):
        pretrain(0, 12, batch=8, tick=stop_after(7), checkpoints=tmp_path)
    (tmp_path / "iteration-000006" / "model.safetensors").unlink()
    with pytest.warns(RuntimeWarning, match="model.safetensors is missing.*starting over"):
        policy = pretrain(0, 12, batch=8, tick=ticks.append, checkpoints=tmp_path)
    assert ticks == list(range(1, 13))
    assert same(policy.state_dict(), expected)


def test_checkpoints_are_gone_when_the_file_is_there(tmp_path):
    path = tmp_path / "pretrained.safetensors"
    with pytest.raises(Stop):
        load_or_pretrain(path, 0, 2, tick=stop_after(2))
    assert [p.name for p in tmp_path.iterdir()] == ["pretraining"]
    load_or_pretrain(path, 0, 2)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_pretraining_has_not_made_or_has_set_aside_survives_it(tmp_path):
    path, folder = tmp_path / "pretrained.safetensors", tmp_path / "pretraining"
    others = [folder / "notes.txt", folder / "iteration-000002.corrupt" / "state.json"]
    for other in others:
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_text("mine")
    (folder / ".writing-000002").mkdir()
    for _ in range(2):  # pretrained, and read from the file
        load_or_pretrain(path, 0, 2)
        assert [p for p in sorted(folder.rglob("*")) if p.is_file()] == sorted(others)
        assert sorted(p.name for p in folder.iterdir()) == [others[1].parent.name, "notes.txt"]


def _train_counted(engine, out):
    """How often this rank pretrained, and the policy that it trained."""
    calls, original = [], pretraining.pretrain
    pretraining.pretrain = lambda *a, **k: calls.append(1) or original(*a, **k)
    jobs.EVALUATION_SAMPLES = 2
    config = TrainConfig(iterations=1, checkpoint_every=1, evaluate_every=100, group_size=2)
    jobs.train_digits("article", config, 2, out, engine, resume=False)
    return {"calls": len(calls)}


@pytest.mark.slow_suite  # half a minute, most of it to start two processes
def test_only_the_first_of_two_ranks_pretrains(tmp_path):
    found = ranks.run(tmp_path / "ranks", 2, _train_counted, tmp_path / "run")
    assert [each["calls"] for each in found] == [1, 0]
    assert (tmp_path / "run" / "pretrained.safetensors").exists()
