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
    monkeypatch.setenv("GUARD_OPS_TRITON_PATH", "one_launch")
    assert choose(H100, cut(1, 64, 65536), 1, True) == "one_launch"
    alone = H100._replace(cooperative=False)
    assert choose(alone, cut(1, 8, 65536), 1, True) == "two_launches"  # programs that may not run
    assert choose(alone._replace(processors=1), cut(1, 8, 65536), 1, True) == "one_launch"
    monkeypatch.setenv("GUARD_OPS_TRITON_PATH", "fast")
    with pytest.raises(ValueError, match="GUARD_OPS_TRITON_PATH is 'fast'; it needs one of two_la"):
        choose(H100, cut(1, 8, 65536), 1, True)


def test_counters_are_slices_of_a_reserve_that_nobody_shares(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(launch, "_reserved", {device: torch.arange(164, dtype=torch.int32)})
    taken = [launch._take(device, count) for count in (10, 1, 50)]
    assert torch.cat(taken).tolist() == list(range(128))  # whole lines of 32
    assert [x.data_ptr() - taken[0].data_ptr() for x in taken] == [0, 128, 256]
    assert launch._take(device, 33) is None  # 36 are left
    assert launch._take(device, 4).tolist() == list(range(128, 160))
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


def test_a_search_is_never_made_on_a_launch_that_may_do_nothing(monkeypatch):
    monkeypatch.setenv("GUARD_OPS_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_tuned", {})
    monkeypatch.setattr(launch, "_milliseconds", lambda launch, warps: abs(warps - 4))
    launched = []
    launch.start_tuned("gradient", ("key",), launched.append, search=False)
    assert launched == [launch.WARPS["gradient"]]
    launch.start_tuned("gradient", ("key",), launched.append)
    launch.start_tuned("gradient", ("key",), launched.append, search=False)
    assert launched[1:] == [4, 4]


RECOMPILES = """
import os, sys, torch
sys.path.insert(0, "scripts")
import kernel_table
from guard_ops.kernels import given_sums, gradient, guard_loss, paths, sde_step, sums
from guard_ops import GuardConfig
from guard_ops.config import objective_of
from guard_ops.transitions import Latents, Rows, Transitions

guard_loss.machine = lambda device: paths.Machine(132, 50 << 20, True)
PATHS = [("two_launches", "standardize"), ("one_launch", "standardize"), ("rows", "closed_form")]

def calls(steps, batch, offset):
    # As a trainer slices what it has stored: beginning anywhere.
    def numbers(*shape, dtype=torch.float64):
        count = torch.Size(shape).numel()
        return torch.zeros(count + offset, dtype=dtype)[offset:].view(shape)
    def latents():
        return torch.zeros(steps, batch, 8192)
    v, x = latents(), latents()
    absent = Latents._make(None for _ in Latents._fields)
    of = absent._replace(model_output=v, sample=x, prev_sample=x, old_model_output=v)
    table = numbers(5, steps, 1).expand(5, steps, batch)
    t = Transitions(of, None, table, 1.0)
    factor = numbers(1, dtype=torch.float32)[0]
    def fused(path, norm, clip=0.2 + offset):
        os.environ["GUARD_OPS_TRITON_PATH"] = path
        advantages, weights = numbers(steps, batch, dtype=torch.float32), numbers(steps, batch)
        rows = Rows(advantages, None, weights, None, None)
        objective = objective_of(GuardConfig(norm, clip_low=clip), True)
        out = torch.zeros((4, steps, batch)), torch.zeros(10, steps)
        guard_loss.guard_loss(t, rows, objective, latents(), None, torch.zeros(()), *out,
                              torch.zeros((3, steps, batch), dtype=torch.float64))
    def alone(launch, *out):
        advantages, weights = numbers(steps, batch, dtype=torch.float32), numbers(steps, batch)
        rows = Rows(advantages, None, weights, None, None)
        objective = objective_of(GuardConfig(clip_low=0.2 + offset), True)
        launch(numbers(3, steps, batch), t, rows, objective, *out)
    per_row = torch.zeros((4, steps, batch)), torch.zeros(11, steps)
    c = numbers(3, steps, batch)
    step = Transitions(absent._replace(model_output=v, sample=x, noise=v), None, table, 1.0)
    return [*[lambda path=path: fused(*path) for path in PATHS],
            lambda: gradient.rescale(t, c, latents(), None, factor),
            lambda: sums.sums(t, torch.zeros((3, steps, batch), dtype=torch.float64)),
            lambda: sde_step.sde_step(step, latents(), latents()),
            lambda: alone(given_sums.ratio_statistics, torch.zeros(5, steps).double()),
            lambda: alone(given_sums.evaluate_sums, torch.zeros(()), *per_row,
                          torch.zeros((3, steps, batch), dtype=torch.float64))]

found = [{(k.metadata.name, k.hash) for k in kernel_table.compiled(90, calls(*of))}
         for of in ((3, 15, 0), (3, 15, 1), (4, 16, 0))]
assert len({name for name, _ in found[0]}) == 9, found
assert found[0] == found[1], "an offset, or a number of the objective, is compiled for"
# Their number rounded up to a power of two is compiled for, and nothing else of a count.
assert found[0] == found[2], "a count is compiled for"
"""


@pytest.mark.slow_suite
@pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("triton") is None, reason="needs Triton"
)
@pytest.mark.skipif(AVAILABLE, reason="runs beside the tests that neither interpret nor launch")
def test_no_slice_and_no_count_is_compiled_for():
    """A kernel compiled while a graph is captured, or in mid-training, is a failure or a stall."""
    root = Path(__file__).parents[2]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(root), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", RECOMPILES]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow_suite
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
