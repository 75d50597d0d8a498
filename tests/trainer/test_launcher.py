"""``torchrun`` on a script that knows nothing of ranks."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_ranks import Blocks
from tiny import tiny_trainer
from guard_ops.trainer import Engine
trainer = tiny_trainer(
    {out!r}, policy=Blocks(), engine=Engine(sys.argv[1], "cpu"), iterations=2, tensorboard=True
)
trainer.fit()
trainer.close()
trainer.engine.close()
"""


@pytest.mark.slow_suite
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_torchrun_starts_a_run_whose_first_rank_writes(tmp_path, sharding):
    tests, out = str(Path(__file__).parent), str(tmp_path / "run")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=tests, out=out))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "--standalone", str(script), sharding], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("training: 2/2") == 1
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"metrics.jsonl", "run.lock", "tensorboard", "checkpoints"}
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
