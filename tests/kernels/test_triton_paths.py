"""The fused loss's three paths: the same bits, and the rule that picks one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import problem, relative, run, truth

import guard_ops as go

pytest.importorskip("triton")

from guard_ops.kernels import paths
from guard_ops.kernels.paths import Machine, choose, cut

H100 = Machine(132, 50 << 20, True)
WIDE = {"clip_low": 0.3, "clip_high": 0.4}
INDEPENDENT = {
    "none": go.GuardConfig("none", **WIDE),
    "paper": go.GuardConfig.paper(**WIDE),
    "drop": go.GuardConfig.paper(nonfinite="drop", **WIDE),
}
GUIDED = {"guided": True, "reference": True}
AVAILABLE = "triton" in go.available_backends()
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="interprets; tests/device run on a GPU"
)


def result(given, config, path, monkeypatch):
    """Everything that a path gives."""
    monkeypatch.setenv("GUARD_OPS_TRITON_PATH", path)
    with go.use_backend("triton"):
        out, grad = run(given, config)
    return [*out[:5], *out.metrics, grad]


def same(first, second):
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(first, second))  # noqa: B905


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", [50, 4096, 9000])
@pytest.mark.parametrize("config", INDEPENDENT)
def test_rows_and_two_launches_give_the_same_bits(config, numel, dtype, monkeypatch):
    given = problem("mean", steps=2, batch=2, latent=(numel,), dtype=dtype, drift=0.3)
    expected = result(given, INDEPENDENT[config], "two_launches", monkeypatch)
    assert same(result(given, INDEPENDENT[config], "rows", monkeypatch), expected)


@interpreted
@pytest.mark.parametrize("config", ["paper", "drop", "article"])
@pytest.mark.parametrize("numel", [50, 9000])
def test_one_launch_and_two_give_the_same_bits(config, numel, monkeypatch):
    """One program, which the interpreter runs alone, is the whole grid here."""
    chosen = INDEPENDENT.get(config, go.GuardConfig.article(**WIDE))
    given = problem("velocity", steps=2, batch=3, latent=(numel,), dtype=torch.float32, drift=0.3)
    expected = result(given, chosen, "two_launches", monkeypatch)
    assert same(result(given, chosen, "one_launch", monkeypatch), expected)


@interpreted
def test_one_launch_that_holds_its_tile(monkeypatch):
    """A program for every segment: of several, where a transition waits for itself alone."""
    from guard_ops.kernels import guard_loss

    monkeypatch.setattr(guard_loss, "machine", lambda device: H100)
    config = INDEPENDENT["paper"]
    given = problem("seeded", steps=2, batch=3, latent=(70,), dtype=torch.float32, drift=0.3)
    expected = result(given, config, "two_launches", monkeypatch)
    assert same(result(given, config, "one_launch", monkeypatch), expected)
    alone = problem("noise", steps=1, batch=1, latent=(70,), dtype=torch.float32, drift=0.3)
    article = go.GuardConfig.article(**WIDE)
    expected = result(alone, article, "two_launches", monkeypatch)
    assert same(result(alone, article, "one_launch", monkeypatch), expected)


@interpreted
@pytest.mark.parametrize("path", ["rows", "one_launch"])
@pytest.mark.parametrize("nonfinite", ["propagate", "drop"])
def test_a_row_that_is_not_finite_mends_the_others(path, nonfinite, monkeypatch):
    """They were written before it was seen; what is a mean over the finite ones changes."""
    given = problem("noise", dtype=torch.float32, drift=0.3, **GUIDED)
    given["model_output"][1, 2, 0, 0] = float("nan")
    config = go.GuardConfig.paper(nonfinite=nonfinite, kl_beta=0.1, **WIDE)
    expected = result(given, config, "two_launches", monkeypatch)
    assert same(result(given, config, path, monkeypatch), expected)


@interpreted
def test_counters_are_zero_again_after_every_path(monkeypatch):
    from guard_ops.kernels import launch

    given = problem("noise", latent=(9000,), dtype=torch.float32)
    for path in paths.PATHS:
        for config in (go.GuardConfig.article(), go.GuardConfig.paper()):
            result(given, config, path, monkeypatch)
            assert launch._of_stream
            for counters in launch._of_stream.values():
                assert not counters.any()


@interpreted
@pytest.mark.parametrize("config", [go.GuardConfig.article(detach_stats=False, **WIDE),
                                    go.GuardConfig.paper(kl_beta=0.1, **WIDE)])  # fmt: skip
def test_more_samples_than_one_program_holds(config, monkeypatch):
    """objective.py between two passes: here, of more than 3."""
    from guard_ops.backends import triton

    monkeypatch.setattr(triton, "MAX_BATCH", 3)
    reference = config.kl_beta > 0
    given = problem("noise", dtype=torch.float32, drift=0.3, reference=reference)
    with go.use_backend("triton"):
        out, grad = run(given, config)
    expected, expected_grad = truth(given, config)
    assert out.loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    assert relative(out.excess, expected.excess) < 1e-5
    assert relative(grad, expected_grad) < 1e-5


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
