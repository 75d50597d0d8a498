"""guard_loss on CUDA by each of its paths, on a GPU or emulated: the same bits, the right numbers.

What holds for every backend of a GPU is tested beside this file; more of the kernels, without
Python, in ``csrc/tests/cuda_test.cpp``.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from combinations import pairs_first
from emulated import EMULATED
from on_device import capture
from problems import FORMS, operands, problem, relative, truth

import guard_ops as go

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "cuda" not in go.available_backends(), reason="needs a GPU and a build with CUDA kernels"
    ),
]
needs_gpu = pytest.mark.skipif(EMULATED, reason="needs a GPU")
DEVICE = "cpu" if EMULATED else "cuda"
# A row for a cluster, and one that is too long.
SIZES = [(3, 64, 64), (16, 64, 64)] if EMULATED else [(16, 64, 64), (16, 21, 60, 104)]

CONFIGS = {
    "article": go.GuardConfig.article(),
    "paper": go.GuardConfig.paper(),
    "flow_grpo": go.GuardConfig.flow_grpo(),
    "article_kl": go.GuardConfig.article(kl_beta=0.04),
}
INDEPENDENT = ("paper", "flow_grpo")  # whose rows need no other row's ratio


@pytest.fixture(autouse=True)
def cuda():
    """The backend in use, and its choice of a path restored."""
    from guard_ops import _C

    with go.use_backend("cuda"):
        yield _C
    _C.force_cuda_path("automatic")


def on_device(given, device=DEVICE):
    """The problem, which ``problem`` makes on the CPU, on a device."""
    return {
        name: value.to(device) if hasattr(value, "to") else value for name, value in given.items()
    }


def made(form="velocity", **more):
    with go.use_backend("reference"):
        return problem(form, **{"dtype": torch.float32, **more})


def bits(given, config, **more):
    """Loss, diagnostics and gradient, as tensors to compare."""
    v = given["model_output"].detach().requires_grad_()
    out = go.guard_loss(**{**given, "model_output": v}, config=config, **more)
    (grad,) = torch.autograd.grad(out.loss, v)
    return [out.loss.detach(), out.log_ratio, out.excess, out.weights, grad, *out.metrics]


def paths(name, latent):
    """What there is besides two launches; a forced path that cannot run is an error."""
    capable, room = True, 1 << 16  # csrc/tests/emulate_runtime.h
    if not EMULATED:
        capable = torch.cuda.get_device_capability() >= (9, 0)
        room = torch.cuda.get_device_properties().shared_memory_per_block_optin
    fits = math.prod(latent) * 16 <= 8 * (room - 4096)  # four float32 operands, in eight blocks
    return ["cooperative", *(["cluster"] if capable and fits and name in INDEPENDENT else [])]


@pytest.mark.parametrize(
    "dtype, latent, name",
    pairs_first(
        itertools.product([torch.float32, torch.bfloat16, torch.float16], [(7,), *SIZES], CONFIGS)
    ),
)
def test_paths_give_the_same_bits(name, latent, dtype, cuda):
    given = on_device(
        made(latent=latent, steps=2, batch=3, dtype=dtype, reference=name == "article_kl")
    )
    cuda.force_cuda_path("two_launches")
    expected = bits(given, CONFIGS[name])
    for path in paths(name, latent):
        cuda.force_cuda_path(path)
        for got, want in zip(bits(given, CONFIGS[name]), expected, strict=True):
            assert torch.equal(got.nan_to_num(9.0), want.nan_to_num(9.0)), path
        assert cuda.last_cuda_path() == path or dtype == torch.float16  # deferred to backward


def config_for(path, latent):
    """An objective that the path can take; skips where the device cannot."""
    name = "flow_grpo" if path == "cluster" else "article"
    if path not in ["two_launches", *paths(name, latent)]:
        pytest.skip("needs clusters of blocks")
    return CONFIGS[name]


@pytest.mark.parametrize(
    "form, guided, path",
    pairs_first(
        itertools.product(FORMS, [False, True], ["two_launches", "cooperative", "cluster"])
    ),
)
def test_every_form_by_every_path(form, guided, path, cuda):
    given = made(form, latent=(3, 31, 17), guided=guided)
    config = config_for(path, (3, 31, 17))
    expected, want = truth(given, config)
    cuda.force_cuda_path(path)
    out = bits(on_device(given), config)
    # of terms of order 1 that cancel, by float32 log-ratios divided by their spread
    assert out[0].item() == pytest.approx(expected.loss.item(), abs=2e-5)
    assert relative(out[4].cpu(), want) < 1e-3  # float32 sums, divided by the batch's spread


def test_multiprocessors_left_free_change_no_bit(cuda):
    given, config = on_device(made(latent=(16, 30, 30))), CONFIGS["article"]
    cuda.force_cuda_path("cooperative")
    expected = bits(given, config)
    cuda.leave_multiprocessors_free(7)
    try:
        assert all(map(torch.equal, bits(given, config), expected))
    finally:
        cuda.leave_multiprocessors_free(0)
    with pytest.raises(ValueError, match="-1 multiprocessors cannot be left free"):
        cuda.leave_multiprocessors_free(-1)


@needs_gpu
@pytest.mark.parametrize("path", ["two_launches", "cooperative", "cluster"])
def test_every_path_is_captured_and_replayed(path, cuda):
    given, config = on_device(made(latent=(16, 64, 64))), config_for(path, (16, 64, 64))
    given["model_output"] = v = given["model_output"].detach()
    cuda.force_cuda_path(path)

    def step():
        out = go.guard_loss_and_grad(**given, config=config)
        return out.loss, out.grad

    graph, captured = capture(step)
    assert cuda.last_cuda_path() == path
    for _ in range(3):
        v.add_(0.01 * torch.randn_like(v))
        graph.replay()
        for got, expected in zip(captured, step(), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("nonfinite", ["drop", "propagate"])
@pytest.mark.parametrize("latent", SIZES)
def test_a_sample_that_is_not_finite_changes_the_same_rows_by_every_path(latent, nonfinite, cuda):
    config = go.GuardConfig("none", clip_low=0.1, clip_high=0.1, nonfinite=nonfinite)
    given = on_device(made(latent=latent, steps=2, batch=3))
    given["model_output"][1, 2].view(-1)[5] = math.nan
    cuda.force_cuda_path("two_launches")
    expected = bits(given, config)
    assert torch.isfinite(expected[4][:, :2]).all()
    for path in paths("flow_grpo", latent):
        cuda.force_cuda_path(path)
        for got, want in zip(bits(given, config), expected, strict=True):
            assert torch.equal(got.nan_to_num(9.0), want.nan_to_num(9.0)), path


@needs_gpu
def test_calls_on_several_streams_and_graphs_beside_each_other(cuda):
    """Each has counters of its own, and leaves them as it found them."""
    given, config = on_device(made(latent=(16, 64, 64))), CONFIGS["article"]
    given["model_output"] = given["model_output"].detach()

    def step():
        out = go.guard_loss_and_grad(**given, config=config)
        return out.loss, out.grad

    for path in ("two_launches", "cooperative"):
        cuda.force_cuda_path(path)
        expected = step()
        graphs = [capture(step) for _ in range(2)]
        streams = [torch.cuda.Stream() for _ in range(4)]
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        eager = []
        for _ in range(10):
            for stream, (graph, _) in zip(streams[:2], graphs, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
            for stream in streams[2:]:
                with torch.cuda.stream(stream):
                    eager.append(step())
        torch.cuda.synchronize()
        for got in [written for _, written in graphs] + eager:
            assert all(map(torch.equal, got, expected))


def test_more_rows_than_a_stream_has_counters_for(cuda):
    small, large = on_device(made(latent=(64,))), on_device(made(latent=(64,), steps=5, batch=210))
    for path in ("two_launches", "cooperative"):
        cuda.force_cuda_path(path)
        for given in (small, large, small):
            first, again = (bits(given, CONFIGS["article"]) for _ in range(2))
            assert all(map(torch.equal, first, again)), path


@needs_gpu
def test_a_factor_is_applied_without_asking_the_host(cuda):
    given = on_device(made(latent=(4, 33)))
    v = given["model_output"].detach().requires_grad_()
    out = go.guard_loss(**{**given, "model_output": v}, config=CONFIGS["article"])
    with torch.cuda.stream(torch.cuda.current_stream()):
        torch.cuda.set_sync_debug_mode("error")
        try:
            (once,) = torch.autograd.grad(out.loss, v, retain_graph=True)
            (half,) = torch.autograd.grad(out.loss, v, torch.full_like(out.loss, 0.5))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert relative(half, once / 2) < 1e-6


def test_opcheck_of_the_scaling_in_place():
    given = on_device(made(latent=(9, 4)))
    latents, seed, table, scale = operands(given)
    v, *_ = latents
    factor, c = torch.tensor(0.5, device=DEVICE), torch.ones(3, 3, 4, device=DEVICE).double()
    arguments = (v.clone(), v.new_empty(0), factor, c, latents, seed, table, scale, True, False)
    torch.library.opcheck(torch.ops.guard_ops.scaled_.default, arguments)


def test_float64_is_refused_with_what_to_do():
    given = on_device(made(dtype=torch.float64))
    with pytest.raises(
        TypeError, match=r"no float64 kernels.*use_backend\('triton'\) or 'reference'"
    ):
        go.guard_loss(**given)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_device_has_its_own_launches(cuda):
    given = made(latent=(16, 64))
    first = bits(on_device(given, "cuda:0"), CONFIGS["article"])
    second = bits(on_device(given, "cuda:1"), CONFIGS["article"])
    assert torch.cuda.current_device() == 0
    for got, want in zip(second, first, strict=True):
        assert got.device.index == 1
        assert torch.equal(got.cpu(), want.cpu())
