import hashlib
import json
import warnings

import pytest
import torch

from guard_ops.trainer import CheckpointError, checkpoint


@pytest.fixture
def root(tmp_path):
    """Three checkpoints; the tensors hold their iteration."""
    for iteration in (10, 20, 30):
        write(tmp_path, iteration)
    return tmp_path


def write(root, iteration, keep=3):
    tensors = {"model": {"w": torch.full((100,), float(iteration))}, "rng": {}}
    return checkpoint.save(root, iteration, tensors, {"note": iteration}, keep)


def contents(folder):
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_what_was_saved_is_loaded(root):
    found = checkpoint.load_latest(root)
    assert found.iteration == 30
    assert torch.equal(found.tensors["model"]["w"], torch.full((100,), 30.0))
    assert found.state == {"note": 30}


def test_dtypes_shared_memory_and_strides_survive(tmp_path):
    base = torch.randn(4, 6)
    group = {
        "a": base.T,
        "b": base[1:3, ::2],
        "half": base.bfloat16(),
        "scalar": torch.tensor(3.0),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }
    checkpoint.save(tmp_path, 1, {"model": group}, {}, 1)
    found = checkpoint.load_latest(tmp_path).tensors["model"]
    for name, value in group.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_there_may_be_none(tmp_path):
    assert checkpoint.load_latest(tmp_path / "absent") is None


def test_only_the_newest_are_kept(root):
    write(root, 40, keep=2)
    assert sorted(p.name for p in root.iterdir()) == ["iteration-000030", "iteration-000040"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "file, damage, reason",
    [
        ("model.safetensors", truncate, "is truncated: "),
        ("model.safetensors", flip_a_bit, "is corrupt: its SHA-256"),
        ("model.safetensors", lambda p: p.unlink(), "is missing"),
        ("state.json", truncate, "is truncated: "),
        ("state.json", empty, "is truncated: 0 bytes of "),
        ("manifest.json", truncate, "is corrupt: "),
        ("manifest.json", empty, "is corrupt: "),
        ("manifest.json", lambda p: p.write_text("[]"), "is corrupt: "),
        ("manifest.json", lambda p: p.unlink(), "is missing"),
    ],
)
def test_a_damaged_one_is_named_and_the_previous_one_used(root, file, damage, reason):
    damage(root / "iteration-000030" / file)
    before = contents(root / "iteration-000030")
    with pytest.warns(RuntimeWarning, match=f"iteration-000030/{file} {reason}"):
        found = checkpoint.load_latest(root)
    assert found.iteration == 20
    assert contents(root / "iteration-000030.corrupt") == before  # kept as it was
    write(root, 30)
    assert contents(root / "iteration-000030.corrupt") == before  # and still when passed again
    assert checkpoint.load_latest(root).iteration == 30


def test_two_damaged_ones_leave_the_third(root):
    truncate(root / "iteration-000030" / "model.safetensors")
    flip_a_bit(root / "iteration-000020" / "model.safetensors")
    with pytest.warns(RuntimeWarning) as caught:
        assert checkpoint.load_latest(root).iteration == 10
    assert len(caught) == 2


def test_when_every_one_is_damaged_it_is_an_error_and_nothing_is_touched(root):
    for folder in root.iterdir():
        truncate(folder / "model.safetensors")
    before = contents(root)
    with pytest.raises(CheckpointError, match="no intact checkpoint") as error:
        checkpoint.load_latest(root)
    for iteration in (10, 20, 30):
        assert f"iteration-0000{iteration}/model.safetensors is truncated" in str(error.value)
    assert contents(root) == before
    assert len(list(root.iterdir())) == 3


def test_another_format_version_is_an_error_not_damage(root):
    path = root / "iteration-000030" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(CheckpointError, match="format version 2; this guard_ops reads 1"):
        checkpoint.load_latest(root)
    assert path.exists()


def test_an_existing_checkpoint_is_never_written_over(root):
    before = contents(root / "iteration-000030")
    with pytest.raises(OSError, match="not empty"):
        write(root, 30)
    assert contents(root / "iteration-000030") == before


def test_what_a_killed_writer_left_is_ignored_and_swept_up(root):
    leftover = root / ".writing-000040"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.load_latest(root).iteration == 30
    write(root, 40)
    assert not leftover.exists()
    assert checkpoint.load_latest(root).iteration == 40
