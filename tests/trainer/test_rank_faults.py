"""Ranks that die: the others end with an error, and the run continues on any number of ranks."""

import os
import shutil
import signal
import time

import plain
import pytest
import ranks
import torch
from test_ranks import Blocks
from tiny import tiny_trainer

from guard_ops.trainer import Engine, checkpoint
from guard_ops.trainer.engine import fill, whole
from guard_ops.trainer.metrics import read_metrics


def weights(trainer):
    """Weights, their average and the optimizer's tensors, in full."""
    state = trainer.optimizer.state_dict()["state"]
    found = {f"model {n}": whole(p.detach()).clone() for n, p in trainer.parameters.items()}
    found |= {f"ema {n}": whole(x).clone() for n, x in trainer.ema.average.items()}
    for index, values in state.items():
        found |= {f"{index} {n}": whole(x).clone() for n, x in values.items()}
    return found


def train(engine, out, iterations, die_in_save=0):
    """Until ``iterations``; rank 1 is killed when it has written its part of a checkpoint."""
    entry = checkpoint.entry

    def die(path):
        if engine.rank == 1 and die_in_save and path.parent.name.endswith(f"{die_in_save:06d}"):
            os.kill(os.getpid(), signal.SIGKILL)
        return entry(path)

    checkpoint.entry = die
    trainer = tiny_trainer(
        out, policy=Blocks(), engine=engine, resume=True, iterations=iterations, group_size=7
    )
    trainer.fit(progress=False)
    result = weights(trainer)
    trainer.close()
    return result


def killed(folder, out):
    """A run of two sharded ranks, of which one is killed in its second checkpoint but one."""
    started = time.monotonic()
    processes = ranks.run(folder, 2, train, out, 6, 4, sharding="fsdp", timeout=20.0, join=False)
    for process in processes:
        process.join(150)
    codes = [process.exitcode for process in processes]
    assert codes == [3, -signal.SIGKILL], codes
    error = (folder / "0.error").read_text()
    assert "Error" in error
    return time.monotonic() - started


@pytest.mark.slow_suite
def test_a_rank_killed_while_it_saves_ends_the_other_and_the_run_continues(tmp_path):
    whole_run = ranks.run(tmp_path / "whole", 2, train, tmp_path / "a", 6, sharding="fsdp")[0]
    killed(tmp_path / "killed", tmp_path / "b")
    left = sorted(p.name for p in (tmp_path / "b" / "checkpoints").iterdir())
    assert left == [".writing-000004", "iteration-000000", "iteration-000002"]
    for count, sharding in ((2, "fsdp"), (1, "ddp"), (4, "fsdp")):
        copy = shutil.copytree(tmp_path / "b", tmp_path / f"{count}")
        results = ranks.run(tmp_path / f"r{count}", count, train, copy, 6, sharding=sharding)
        for result in results:
            assert result.keys() == whole_run.keys()
            for name, value in whole_run.items():
                if count == 2:
                    assert torch.equal(result[name], value), name
                else:
                    assert plain.relative({"": result[name]}, {"": value}) < 1e-9, name
        assert len(read_metrics(copy / "metrics.jsonl")) == 6
    files = {p.suffix for p in (tmp_path / "2" / "checkpoints").rglob("*") if p.is_file()}
    assert files == {".safetensors", ".json"}


class Later(Blocks):
    """Its weights are read when it is sharded."""

    def __init__(self):
        with torch.device("meta"):
            super().__init__()
        self.base.requires_grad_(False)

    def load_weights(self):
        for mine, right in zip(self.parameters(), Blocks().parameters(), strict=True):
            fill(mine, right)


def save_sharded(engine, out):
    """Two iterations and a checkpoint; what is in it."""
    later = tiny_trainer(f"{out}-later", policy=Later(), engine=engine, iterations=2, group_size=7)
    later.fit(progress=False)
    result = train(engine, out, 2)
    for name, value in weights(later).items():
        assert torch.equal(value, result[name]), name
    return result


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of two sharded ranks with a checkpoint, and its weights."""
    folder = tmp_path_factory.mktemp("sharded")
    return folder, ranks.run(folder / "r", 2, save_sharded, folder / "run", sharding="fsdp")[0]


def test_what_ranks_have_written_in_parts_one_process_reads(saved, tmp_path):
    folder, expected = saved
    out = shutil.copytree(folder / "run", tmp_path / "run")
    names = {p.name for p in (out / "checkpoints" / "iteration-000002").iterdir()}
    parts = {f"shard-0000{n}-model-00001-of-00001.safetensors" for n in (1, 2)}
    assert names == parts | {"state.json", "manifest.json"}
    trainer = tiny_trainer(
        out, policy=Blocks(), resume=True, iterations=2, group_size=7, engine=Engine(device="cpu")
    )
    found = weights(trainer)
    assert trainer.iteration == 2
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    trainer.close()


@pytest.mark.parametrize("what", ["flip", "missing"])
def test_a_damaged_part_is_set_aside(saved, tmp_path, what):
    folder, _ = saved
    out = shutil.copytree(folder / "run", tmp_path / "run")
    part = next((out / "checkpoints" / "iteration-000002").glob("shard-00002-*"))
    if what == "flip":
        contents = bytearray(part.read_bytes())
        contents[-1] ^= 1
        part.write_bytes(contents)
    else:
        part.unlink()
    with pytest.warns(RuntimeWarning, match=r"shard-00002-.* is (corrupt|missing)"):
        trainer = tiny_trainer(out, policy=Blocks(), resume=True, iterations=2, group_size=7)
    assert trainer.iteration == 0
    trainer.close()
