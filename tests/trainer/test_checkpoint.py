import hashlib
import json
import os
import shutil
import warnings

import pytest
import torch
from tiny import full_disk

from guard_ops.trainer import RunFolderError, checkpoint


@pytest.fixture
def root(tmp_path):
    """Three checkpoints; the tensors hold their iteration."""
    for iteration in (10, 20, 30):
        write(tmp_path, iteration)
    return tmp_path


def write(root, iteration, keep=3):
    tensors = {"model": {"w": torch.full((100,), float(iteration))}, "rng": {}}
    return checkpoint.save(root, iteration, tensors, {"note": iteration}, keep)


def load_latest(root):
    """The newest that can be used; those that cannot are set aside."""
    found, unusable = checkpoint.newest(root, lambda saved: saved)
    checkpoint.set_aside(unusable, "using the previous checkpoint")
    return found


def contents(folder):
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_what_was_saved_is_loaded(root):
    found = load_latest(root)
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
    found = load_latest(tmp_path).tensors["model"]
    for name, value in group.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_there_may_be_none(tmp_path):
    assert load_latest(tmp_path / "absent") is None


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


def rewrite(change):
    """Damage to a manifest by somebody who also mends its own SHA-256."""

    def damage(path):
        manifest = json.loads(path.read_text())
        del manifest["sha256"]
        change(manifest)
        path.write_text(json.dumps(manifest | {"sha256": checkpoint._digest(manifest)}))

    return damage


def edit(change):
    """Damage to a manifest that leaves its SHA-256 as it was."""

    def damage(path):
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return damage


def replaced(text):
    """A file with other contents, of which the manifest has size and SHA-256."""

    def damage(path):
        path.write_bytes(text)
        entry = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        rewrite(lambda m: m["files"].update({path.name: entry}))(path.parent / "manifest.json")

    return damage


def a_link(path):
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def a_folder(path):
    path.unlink()
    path.mkdir()


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def another_name(manifest):
    files = manifest["files"]
    files["../iteration-000020/model.safetensors"] = files.pop("model.safetensors")


@pytest.mark.parametrize(
    "file, damage, reason",
    [
        ("model.safetensors", truncate, "is truncated: "),
        ("model.safetensors", lambda p: p.write_bytes(p.read_bytes() + b"x"), "is corrupt: "),
        ("model.safetensors", flip_a_bit, "is corrupt: its SHA-256"),
        ("model.safetensors", lambda p: p.unlink(), "is missing"),
        ("model.safetensors", a_link, "is not a file"),
        ("model.safetensors", a_folder, "is not a file"),
        ("model.safetensors", a_pipe, "is not a file"),
        ("model.safetensors", replaced(b"no tensors"), "is corrupt: "),
        ("model.safetensors", replaced(b"\xff" * 8), "is corrupt: "),
        ("notes.txt", lambda p: p.write_text("mine"), "is not of this checkpoint"),
        ("state.json", truncate, "is truncated: "),
        ("state.json", empty, "is truncated: 0 bytes of "),
        ("state.json", replaced(b"[" * 100_000), "is corrupt: maximum recursion"),
        ("state.json", replaced(b"[]"), "is corrupt: it holds no JSON object"),
        ("state.json", replaced(b'{"note": \xff}'), "is corrupt: 'utf-8'"),
        ("manifest.json", truncate, "is corrupt: "),
        ("manifest.json", empty, "is corrupt: "),
        ("manifest.json", lambda p: p.write_text("[]"), "is corrupt: it holds no JSON object"),
        ("manifest.json", lambda p: p.write_text("{" * 100_000), "is corrupt: "),
        ("manifest.json", lambda p: p.write_text('{"a":' * 100_000), "is corrupt: maximum rec"),
        ("manifest.json", lambda p: p.unlink(), "is missing"),
        ("manifest.json", a_link, "is not a file"),
        ("manifest.json", a_folder, "is not a file"),
        ("manifest.json", a_pipe, "is not a file"),
        ("manifest.json", edit(lambda m: m.update(iteration=32)), "is corrupt: its own SHA-256"),
        ("manifest.json", edit(lambda m: m.update(files={})), "is corrupt: its own SHA-256"),
        ("manifest.json", edit(lambda m: m.pop("sha256")), "is corrupt: it has no SHA-256"),
        ("manifest.json", edit(lambda m: m.update(sha256=[])), "is corrupt: its own SHA-256"),
        ("manifest.json", edit(another_name), "is corrupt: its own SHA-256"),
        ("manifest.json", rewrite(lambda m: m.update(iteration=32)), "is of iteration 32, not of"),
        ("manifest.json", rewrite(lambda m: m.update(iteration="30")), "is of iteration '30'"),
        ("manifest.json", rewrite(lambda m: m.update(files={})), "is corrupt: it does not list s"),
        ("manifest.json", rewrite(lambda m: m.update(files=[])), "is corrupt: it does not list s"),
        ("manifest.json", rewrite(lambda m: m["files"].pop("state.json")), "is corrupt: it does"),
        ("manifest.json", rewrite(another_name), "is corrupt: it lists '../iteration-000020/mode"),
        ("manifest.json", rewrite(lambda m: m["files"].update({"x": 3})), "is corrupt: it lists"),
        (
            "manifest.json",
            rewrite(lambda m: m["files"]["state.json"].update(bytes="9")),
            "is corrupt: it lists 'state.json' as ",
        ),
    ],
)
def test_a_damaged_one_is_named_and_the_previous_one_used(root, file, damage, reason):
    damage(root / "iteration-000030" / file)
    before = contents(root / "iteration-000030")
    with pytest.warns(RuntimeWarning) as caught:
        found = load_latest(root)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert f"iteration-000030/{file} {reason}" in text
    assert text.endswith("; kept as iteration-000030.corrupt, using the previous checkpoint")
    assert found.iteration == 20
    assert torch.equal(found.tensors["model"]["w"], torch.full((100,), 20.0))
    assert contents(root / "iteration-000030.corrupt") == before  # kept as it was
    write(root, 30)
    assert contents(root / "iteration-000030.corrupt") == before  # and still when passed again
    assert load_latest(root).iteration == 30


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_stands_in_a_checkpoints_place_is_set_aside_or_deleted_when_old(root, kind):
    for iteration in (10, 30):
        path = root / f"iteration-0000{iteration}"
        shutil.rmtree(path)
        path.write_text("") if kind == "file" else path.symlink_to("iteration-000020")
    with pytest.warns(RuntimeWarning, match="iteration-000030 is not a folder; kept as "):
        assert load_latest(root).iteration == 20
    write(root, 40, keep=2)
    assert sorted(p.name for p in root.glob("*0")) == ["iteration-000020", "iteration-000040"]


def test_a_flipped_bit_anywhere_in_a_manifest_is_noticed(root):
    path = root / "iteration-000030" / "manifest.json"
    intact = path.read_bytes()
    for place in range(len(intact)):
        data = bytearray(intact)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        with pytest.raises(checkpoint.CheckpointError):
            checkpoint.load(path.parent)


def test_a_state_that_is_not_understood_is_set_aside_too(root):
    def understand(saved):
        return 10 // (saved.iteration - 30) if saved.iteration > 20 else saved.state["note"]

    def missing(saved):
        return saved.state["note" if saved.iteration < 30 else "other"]

    with pytest.raises(ZeroDivisionError):  # not what the content of a file does
        checkpoint.newest(root, understand)
    found, unusable = checkpoint.newest(root, missing)
    assert found == 20
    assert unusable[0].reason.endswith("000030 does not hold the state of a run: KeyError: 'other'")


def test_two_damaged_ones_leave_the_third(root):
    truncate(root / "iteration-000030" / "model.safetensors")
    flip_a_bit(root / "iteration-000020" / "model.safetensors")
    with pytest.warns(RuntimeWarning) as caught:
        assert load_latest(root).iteration == 10
    assert len(caught) == 2


def test_when_every_one_is_damaged_all_are_named_and_nothing_is_touched(root):
    for folder in root.iterdir():
        truncate(folder / "model.safetensors")
    before = contents(root)
    found, unusable = checkpoint.newest(root, lambda saved: saved)
    assert found is None
    for iteration, one in zip((30, 20, 10), unusable, strict=True):
        assert f"iteration-0000{iteration}/model.safetensors is truncated" in one.reason
    assert contents(root) == before
    assert len(list(root.iterdir())) == 3


@pytest.mark.parametrize("version", [1, 2, "3", None])
def test_another_format_version_is_set_aside_under_a_name_that_says_so(root, version):
    rewrite(lambda m: m.update(version=version))(root / "iteration-000030" / "manifest.json")
    with pytest.warns(RuntimeWarning, match="has format version .*; this guard_ops reads 3; kept"):
        assert load_latest(root).iteration == 20
    assert (root / "iteration-000030.other-version" / "manifest.json").exists()


def test_an_existing_checkpoint_is_never_written_over(root):
    before = contents(root / "iteration-000030")
    with pytest.raises(RunFolderError, match="iteration-000030 exists: iteration 30 is saved"):
        write(root, 30)
    assert contents(root / "iteration-000030") == before


@pytest.mark.parametrize("limit", [0, 100, 460])
def test_a_full_disk_is_one_sentence_and_leaves_the_others(root, limit):
    with full_disk(limit), pytest.raises(RunFolderError, match=r"^cannot write .*\.writing-000040"):
        write(root, 40, keep=1)
    assert sorted(p.name for p in root.iterdir()) == [f"iteration-0000{n}" for n in (10, 20, 30)]
    assert load_latest(root).iteration == 30
    write(root, 40)
    assert load_latest(root).iteration == 40


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match=r"^cannot write .*/file/checkpoints: Not a"):
        write(tmp_path / "file" / "checkpoints", 1)


def test_what_a_killed_writer_left_is_ignored_and_swept_up(root):
    leftover = root / ".writing-000040"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_latest(root).iteration == 30
    write(root, 40)
    assert not leftover.exists()
    assert load_latest(root).iteration == 40
