"""The rule that picks one of the fused loss's paths, its counters, the machine code."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import guard_ops as go

pytest.importorskip("triton")

from guard_ops.kernels import launch, paths
from guard_ops.kernels.paths import Machine, choose, cut

H100 = Machine(132, 50 << 20, True)
AVAILABLE = "triton" in go.available_backends()


def test_a_row_is_cut_by_its_length_alone():
    for numel in (1, 4096, 4097, 65536, 524288, 2_096_640, 2**31 - 1):
        parts = cut(3, 5, numel)
        assert parts.segments <= paths.MAX_SEGMENTS
        covered = parts.segments * parts.tiles * 4096
        assert covered >= numel > covered - parts.tiles * 4096
        assert cut(1, 1, numel)._replace(rows=15) == parts


def test_the_rule():
    """What docs/gpu.md says of an H100."""

    def path(steps, batch, numel, independent=False, on=H100):
        return choose(on, cut(steps, batch, numel), 10 * numel, independent)

    assert path(1, 8, 65536) == "one_launch"  # SD3.5 at 512: 128 segments
    assert path(1, 9, 65536) == "two_launches"  # 144, more than processors
    assert path(1, 9, 65536, independent=True) == "two_launches"  # too few rows
    assert path(20, 16, 4096, independent=True) == "rows"  # a row is one tile
    assert path(20, 16, 16384, independent=True) == "rows"  # in flight: 43 MB of 50
    assert path(20, 16, 65536, independent=True) == "two_launches"
    assert path(1, 16, 2_096_640) == "two_launches"
    assert path(1, 8, 65536, on=H100._replace(cooperative=False)) == "two_launches"


def test_the_path_can_be_asked_for_by_name(monkeypatch):
    monkeypatch.setenv("GUARD_OPS_TRITON_PATH", "rows")
    assert choose(H100, cut(1, 8, 65536), 1, True) == "rows"
    assert choose(H100, cut(1, 8, 65536), 1, False) == "two_launches"  # rows need each other
    monkeypatch.setenv("GUARD_OPS_TRITON_PATH", "fast")
    with pytest.raises(ValueError, match="GUARD_OPS_TRITON_PATH is 'fast'; it needs one of two_la"):
        choose(H100, cut(1, 8, 65536), 1, True)


def test_counters_are_slices_of_a_reserve_that_nobody_shares(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(launch, "_reserved", {device: torch.arange(100, dtype=torch.int32)})
    taken = [launch._take(device, count) for count in (10, 1, 50)]
    assert torch.cat(taken).tolist() == list(range(61))
    assert launch._take(device, 40) is None  # 39 are left
    assert launch._take(device, 39).tolist() == list(range(61, 100))
    assert launch._take(device, 1) is None
    assert launch._take(torch.device("meta"), 1) is None


def test_one_step_is_compiled_for_like_several():
    """What Triton specializes on: the strides of a slice, and of a whole trajectory."""
    x = torch.empty(4, 8, 4096)
    assert launch.strides_of(x) == (8 * 4096, 4096)
    assert launch.strides_of(x[:1]) == (0, 4096)
    assert launch.strides_of(x[:, :1]) == (8 * 4096, 0)
    assert launch.strides_of(x.transpose(0, 1)[:1]) == (0, 8 * 4096)
    assert launch.strides_of(None) == (0, 0)


@pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("triton") is None, reason="needs Triton"
)
@pytest.mark.skipif(AVAILABLE, reason="runs beside the tests that neither interpret nor launch")
def test_machine_code_keeps_its_bounds():
    """No spills, registers, 128-bit loads and stores of sm_80, 90, 100, 120; docs/kernels.md."""
    root = Path(__file__).parents[2]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, root / "scripts" / "kernel_table.py", "--check"]
    env["PYTHONPATH"] = os.pathsep.join([str(root), env.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
