"""The fused loss's three paths on Triton: the same bits, and counters that are zero again."""

import itertools

import pytest
import torch
from combinations import pairs_first
from on_device import problem_on
from problems import relative, run, truth

import guard_ops as go

pytest.importorskip("triton")

from guard_ops.kernels import guard_loss, launch, paths
from guard_ops.kernels.paths import Machine

WIDE = {"clip_low": 0.3, "clip_high": 0.4}
INDEPENDENT = {
    "none": go.GuardConfig("none", **WIDE),
    "paper": go.GuardConfig.paper(**WIDE),
    "drop": go.GuardConfig.paper(nonfinite="drop", **WIDE),
}
ARTICLE = go.GuardConfig.article(**WIDE)
GUIDED = {"guided": True, "reference": True}
LARGE = [65_536, 2_096_640]  # one tile a segment, and several: for a device


@pytest.fixture
def triton(place):
    """A :class:`Place` of this backend."""
    if place.backend != "triton":
        pytest.skip("paths of the Triton kernels")
    return place


def of_a_size(place, numel):
    if place.device.type == "cpu" and numel in LARGE:
        pytest.skip("too many tiles to interpret")


def result(given, config, path, monkeypatch):
    """Everything that a path gives."""
    monkeypatch.setenv("GUARD_OPS_TRITON_PATH", path)
    out, grad = run(given, config)
    return [*out[:5], *out.metrics, grad]


def same(first, second):
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs)


@pytest.mark.parametrize(
    "config, numel, dtype",
    pairs_first(
        itertools.product(INDEPENDENT, [50, 4096, 9000, *LARGE], [torch.float32, torch.bfloat16])
    ),
)
def test_rows_and_two_launches_give_the_same_bits(config, numel, dtype, triton, monkeypatch):
    of_a_size(triton, numel)
    _, given = problem_on(
        triton.device, "mean", steps=2, batch=2, latent=(numel,), dtype=dtype, drift=0.3
    )
    expected = result(given, INDEPENDENT[config], "two_launches", monkeypatch)
    assert same(result(given, INDEPENDENT[config], "rows", monkeypatch), expected)


@pytest.mark.parametrize("config", ["paper", "drop", "article"])
@pytest.mark.parametrize("numel", [50, 9000, *LARGE])
def test_one_launch_and_two_give_the_same_bits(config, numel, triton, monkeypatch):
    """One program is the interpreter's whole grid; a device's holds its tiles, or persists."""
    of_a_size(triton, numel)
    chosen = INDEPENDENT.get(config, ARTICLE)
    _, given = problem_on(
        triton.device, "velocity", steps=2, batch=3, latent=(numel,), dtype=torch.float32, drift=0.3
    )
    expected = result(given, chosen, "two_launches", monkeypatch)
    assert same(result(given, chosen, "one_launch", monkeypatch), expected)


def test_one_launch_that_holds_its_tile(triton, monkeypatch):
    """A program for every segment: of several, where a transition waits for itself alone."""
    if triton.device.type == "cpu":
        monkeypatch.setattr(guard_loss, "machine", lambda device: Machine(132, 50 << 20, True))
    config = INDEPENDENT["paper"]
    _, given = problem_on(
        triton.device, "seeded", steps=2, batch=3, latent=(70,), dtype=torch.float32, drift=0.3
    )
    expected = result(given, config, "two_launches", monkeypatch)
    assert same(result(given, config, "one_launch", monkeypatch), expected)
    _, alone = problem_on(
        triton.device, "noise", steps=1, batch=1, latent=(70,), dtype=torch.float32, drift=0.3
    )
    config = go.GuardConfig(**WIDE)
    expected = result(alone, config, "two_launches", monkeypatch)
    assert same(result(alone, config, "one_launch", monkeypatch), expected)


def test_a_cooperative_launch_that_is_refused_is_two_and_not_tried_again(triton, monkeypatch):
    monkeypatch.setattr(paths, "_machine", lambda device: Machine(132, 50 << 20, True))
    monkeypatch.setattr(paths, "_apart", set())
    tried, start = [], guard_loss.start

    def refuse(kernel, *args, **options):
        if kernel is guard_loss.grid_kernel:
            tried.append(kernel)
            raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")
        start(kernel, *args, **options)

    _, given = problem_on(triton.device, "noise", dtype=torch.float32, drift=0.3)
    expected = result(given, ARTICLE, "two_launches", monkeypatch)
    monkeypatch.setattr(guard_loss, "start", refuse)
    for path in ("", "", "one_launch"):  # chosen, and forced
        assert same(result(given, ARTICLE, path, monkeypatch), expected)
    assert len(tried) == 1


@pytest.mark.parametrize("path", ["rows", "one_launch"])
@pytest.mark.parametrize("nonfinite", ["propagate", "drop"])
def test_a_row_that_is_not_finite_mends_the_others(path, nonfinite, triton, monkeypatch):
    """They were written before it was seen; what is a mean over the finite ones changes."""
    _, given = problem_on(triton.device, "noise", dtype=torch.float32, drift=0.3, **GUIDED)
    given["model_output"][1, 2, 0, 0] = float("nan")
    config = go.GuardConfig.paper(nonfinite=nonfinite, kl_beta=0.1, **WIDE)
    expected = result(given, config, "two_launches", monkeypatch)
    assert same(result(given, config, path, monkeypatch), expected)


def test_counters_are_zero_again_after_every_path(triton, monkeypatch):
    _, given = problem_on(triton.device, "noise", latent=(9000,), dtype=torch.float32)
    for path in paths.PATHS:
        for config in (go.GuardConfig.article(), go.GuardConfig.paper()):
            result(given, config, path, monkeypatch)
            assert launch._of_stream
            for counters in launch._of_stream.values():
                assert not counters.any()


@pytest.mark.parametrize("config", [go.GuardConfig.article(detach_stats=False, **WIDE),
                                    go.GuardConfig.paper(kl_beta=0.1, **WIDE)])  # fmt: skip
def test_more_samples_than_one_program_holds(config, triton, monkeypatch):
    """objective.py between two passes: here, of more than 3."""
    monkeypatch.setattr("guard_ops.backends.triton.MAX_BATCH", 3)
    monkeypatch.delattr("guard_ops.backends.triton.guard_loss")  # nobody calls it
    here, there = problem_on(
        triton.device, "noise", dtype=torch.float32, drift=0.3, reference=config.kl_beta > 0
    )
    run(there, config)  # compiles, on a device
    if triton.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        out, grad = run(there, config)
    finally:
        if triton.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    expected, expected_grad = truth(here, config)
    assert out.loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    assert relative(out.excess.cpu(), expected.excess) < 1e-5
    assert relative(grad.cpu(), expected_grad) < 1e-5


def test_more_samples_than_one_program_holds_in_one_graph(triton, monkeypatch):
    monkeypatch.setattr("guard_ops.backends.triton.MAX_BATCH", 3)
    _, given = problem_on(triton.device, "noise", dtype=torch.float32, drift=0.3)
    rest = {name: x for name, x in given.items() if name not in ("model_output", "coeffs")}
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(v, **rest):
        return go.guard_loss(v, coeffs=given["coeffs"], config=ARTICLE, **rest).loss

    v = given["model_output"].detach().requires_grad_()
    loss(v, **rest).backward()
    assert torch.equal(v.grad, run(given, ARTICLE)[1])
