"""On a GPU: the same bits every time, no host synchronization, CUDA graphs, torch.compile."""

import pytest
import torch
from on_device import capture, problem_on
from problems import run

import guard_ops as go

CONFIGS = {
    "article": go.GuardConfig(),  # of one step, so without its balance
    "paper": go.GuardConfig.paper(clip_low=0.1, clip_high=0.1),
    "drop": go.GuardConfig("none", nonfinite="drop", clip_low=0.1, clip_high=0.1),
}
SIZES = {"resident": (16, 64, 64), "in two launches": (16, 128, 128, 4), "one tile": (64, 64)}


def make(gpu, form="mean", latent=(16, 64, 64), dtype=torch.bfloat16, **more):
    _, there = problem_on(gpu.device, form, steps=None, batch=8, latent=latent, dtype=dtype, **more)
    return there


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("size", SIZES)
def test_twenty_runs_give_the_same_bits(size, config, gpu):
    given = make(gpu, latent=SIZES[size])
    first, grad = run(given, CONFIGS[config])
    for _ in range(20):
        out, again = run(given, CONFIGS[config])
        assert torch.equal(out.loss, first.loss)
        assert torch.equal(out.excess, first.excess)
        assert torch.equal(again, grad)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("form", ["mean", "velocity", "noise", "seeded", "log-prob"])
def test_nothing_waits_for_the_device(form, config, gpu):
    if form == "log-prob" and config == "paper":
        pytest.skip("closed_form needs the behaviour policy's mean")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = make(gpu, form, dtype=dtype)
        run(given, CONFIGS[config])  # compiles, and makes the counters
        v = given["model_output"].detach().requires_grad_()
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = go.guard_loss(**{**given, "model_output": v}, config=CONFIGS[config])
            (out.loss * 2).backward()
            if form != "log-prob":
                operands = {k: x for k, x in given.items() if k != "advantages"}
                go.log_ratio(**operands)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_steps_are_taken_of_a_schedule_without_waiting(gpu):
    schedule = go.SdeSchedule([1.0, 0.8, 0.5, 0.2, 0.0])
    there = schedule.to(gpu.device)
    chosen = (1, slice(1, 3), slice(3, None, -1), [2, 0], torch.tensor([0, 2]).to(gpu.device))
    torch.cuda.set_sync_debug_mode("error")
    try:
        taken = [there[k] for k in chosen]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, k in zip(taken, chosen, strict=True):
        assert torch.equal(got.table.cpu(), schedule[k.cpu() if torch.is_tensor(k) else k].table)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("size", SIZES)
def test_a_graph_replays_on_new_numbers(size, config, gpu):
    given = make(gpu, latent=SIZES[size])
    given["model_output"] = given["model_output"].detach().requires_grad_()
    v = given["model_output"]

    def step():
        out = go.guard_loss(**given, config=CONFIGS[config])
        (grad,) = torch.autograd.grad(out.loss, v)
        return out.loss, out.excess, grad

    graph, captured = capture(step)
    for _ in range(3):
        with torch.no_grad():
            v.add_(0.01 * torch.randn_like(v))
        graph.replay()
        for got, expected in zip(captured, step(), strict=True):
            assert torch.equal(got, expected)


def test_calls_on_two_streams_do_not_meet(gpu):
    given = make(gpu)
    expected, expected_grad = run(given, CONFIGS["article"])
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    torch.cuda.synchronize()
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(run(given, CONFIGS["article"]))
    torch.cuda.synchronize()
    for out, grad in results:
        assert torch.equal(out.loss, expected.loss)
        assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS)
def test_torch_compile_without_a_graph_break(config, dtype, gpu):
    torch.compiler.reset()  # of one function it compiles so many variants and no more
    given = make(gpu, dtype=dtype)
    operands = {k: x for k, x in given.items() if k not in ("model_output", "coeffs")}

    @torch.compile(fullgraph=True)
    def loss(v, **operands):
        return go.guard_loss(v, coeffs=given["coeffs"], config=CONFIGS[config], **operands).loss

    v = given["model_output"].detach().requires_grad_()
    value = loss(v, **operands)
    value.backward()
    expected, grad = run(given, CONFIGS[config])
    assert torch.equal(value, expected.loss)
    assert torch.equal(v.grad, grad)


def test_torch_compile_records_its_own_graphs(gpu):
    """mode="reduce-overhead" lets no memory that is first allocated inside its graphs live on."""
    torch.compiler.reset()
    given = make(gpu)
    operands = {k: x for k, x in given.items() if k not in ("model_output", "coeffs")}

    @torch.compile(fullgraph=True, mode="reduce-overhead")
    def loss(v, **operands):
        return go.guard_loss(v, coeffs=given["coeffs"], config=CONFIGS["article"], **operands).loss

    v = given["model_output"].detach().requires_grad_()
    expected, grad = run(given, CONFIGS["article"])
    for _ in range(4):  # warm-up, recording, replays
        v.grad = None
        torch.compiler.cudagraph_mark_step_begin()
        value = loss(v, **operands)
        value.backward()
        assert torch.equal(value, expected.loss)
        assert torch.equal(v.grad, grad)


def test_a_row_of_more_than_two_to_the_31_elements(gpu):
    """Offsets are 64 bits wide: the last elements decide."""
    numel = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 12 * numel:
        pytest.skip("needs 26 GB of free device memory")
    v = torch.zeros(1, numel, dtype=torch.bfloat16, device=gpu.device)
    old, noise = torch.zeros_like(v), torch.zeros_like(v)
    v[0, -8:], noise[0, -8:] = 1.0, 2.0
    coeffs = go.SdeSchedule([1.0, 0.8, 0.5, 0.0])[1].to(gpu.device)
    config = go.GuardConfig("none", reduction="sum", clip_low=9.0, clip_high=9.0)
    loss, grad, *_ = go.guard_loss_and_grad(
        v, advantages=torch.ones(1, device=gpu.device), coeffs=coeffs, config=config,
        old_model_output=old, noise=noise,
    )  # fmt: skip
    b, s, kappa = (float(x) for x in (coeffs.b, coeffs.s, coeffs.kappa))
    log_r = kappa * 8 * (2 * b * s * 2 - b * b)
    assert loss.item() == pytest.approx(-torch.tensor(log_r).double().exp().item(), rel=1e-5)
    assert grad[0, :-8].abs().max() == 0
    assert grad[0, -8:].abs().min() > 0
