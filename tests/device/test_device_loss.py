"""Ops on a device against ``reference`` in float64 on the CPU, on the same, rounded, numbers.

Tolerances are those of tests/test_numerics.py: float32 operands of order 1 are 6e-8 from the real
ones, and a 16-bit gradient is rounded once, to half of 2^-8 or 2^-11 of each element.
"""

import dataclasses
import itertools
import math

import pytest
import torch
from combinations import pairs_first, values_first
from on_device import moved, problem_on, rollout_on
from problems import FORMS, largest, operands, relative, run, truth, without_advantages

import guard_ops as go
from guard_ops.backends import select
from guard_ops.config import objective_of
from guard_ops.transitions import Latents, Rows, Transitions

CUDA = torch.cuda.is_available()
NARROW = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2e-3, torch.float16: 5e-4}
WIDE = {"clip_low": 0.3, "clip_high": 0.4}
MODES = {
    "none": go.GuardConfig("none", **WIDE),
    "none, sum": go.GuardConfig("none", reduction="sum", clip_low=9.0, clip_high=9.0),
    "article": go.GuardConfig.article(**WIDE),
    "through statistics": go.GuardConfig.article(detach_stats=False, **WIDE),
    "paper": go.GuardConfig.paper(**WIDE),
    "paper, inverse_ratio": go.GuardConfig.paper(balance="inverse_ratio", **WIDE),
    "drop": go.GuardConfig("none", balance="inverse_dt", nonfinite="drop", **WIDE),
}


def of_steps(mode, steps):
    """A mode's config; one step has no others that inverse_ratio could weigh it against."""
    config = MODES[mode]
    if steps in (None, 1) and config.balance == "inverse_ratio":
        config = dataclasses.replace(config, balance="none")
    return config


def compare(there, here, config, dtype, **more):
    """Loss, diagnostics and gradient of a problem on the device and on the CPU."""
    out, grad = run(there, config, **more)
    expected, expected_grad = truth(here, config, **more)
    bound = 2e-5 * max(1.0, expected.excess.abs().max().item())
    for name in ("log_ratio", "excess", "weights", "kl"):
        got, wanted = getattr(out, name).cpu(), getattr(expected, name)
        assert largest(got, wanted) <= bound * max(1.0, wanted.abs().max().item()), name
    assert abs(out.loss.item() - expected.loss.item()) <= 2 * bound
    for name, wanted in expected.metrics._asdict().items():
        got = getattr(out.metrics, name).cpu().double()
        torch.testing.assert_close(got, wanted, rtol=5e-5, atol=bound, equal_nan=True, msg=name)
    assert grad.dtype == dtype
    assert relative(grad.cpu(), expected_grad) < ROUNDING[dtype] * max(1.0, bound / 2e-5)
    return out, grad


# A form ends in two sums and a mode begins with them, so that not every pair is new to a kernel:
# every mode is there with kl_old and, where it can be, without, and every form by both ways. A GPU
# takes every pair.
FORMS_AND_MODES = [
    (form, mode)
    for form in FORMS
    for mode, config in MODES.items()
    if CUDA or form in ("velocity", "log-prob") or mode in ("article", "paper")
    if not (form == "log-prob" and config.ratio_norm == "closed_form")  # needs the policy's mean
]


@pytest.mark.parametrize("form, mode", FORMS_AND_MODES)
def test_every_form_and_mode(form, mode, place):
    here, there = problem_on(place.device, form, dtype=torch.float32, latent=(5, 9), drift=0.3)
    compare(there, here, MODES[mode], torch.float32)


@pytest.mark.parametrize("form, dtype", values_first(itertools.product(FORMS, NARROW[1:])))
def test_every_form_in_16_bits(form, dtype, place):
    here, there = problem_on(place.device, form, dtype=dtype, latent=(40,), drift=0.5)
    compare(there, here, MODES["article"], dtype)


# Less than a tile or a chunk, one more than a tile, and several of each.
SIZES = [(2, 1), (2, 7), (2, 127), (None, 4097), (2, 4097), (None, 9000)]
if CUDA:
    SIZES = [(steps, numel) for steps in (None, 2) for numel in (1, 7, 127, 4097, 20000)]


@pytest.mark.parametrize("steps, numel", SIZES)
@pytest.mark.parametrize("form", ["mean", "seeded"])
def test_every_size_of_latent(steps, form, numel, place):
    here, there = problem_on(
        place.device, form, steps=steps, batch=2, latent=(numel,), dtype=torch.float32, drift=0.3
    )
    for mode in ("article", "paper"):
        compare(there, here, of_steps(mode, steps), torch.float32)


@pytest.mark.parametrize("steps, batch", [(None, 1), (5, 1), (1, 33), (7, 19)])
def test_every_number_of_steps_and_samples(steps, batch, place):
    here, there = problem_on(
        place.device, "noise", steps=min(steps or 1, 5), batch=batch, latent=(6,),
        dtype=torch.float32, drift=0.5,
    )  # fmt: skip
    compare(there, here, of_steps("article", steps), torch.float32)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("mode", ["article", "paper", "drop"])
def test_guidance_and_the_kl_term(mode, guided, place):
    config = go.GuardConfig(**{**vars(MODES[mode]), "kl_beta": 0.1})
    here, there = problem_on(
        place.device, "velocity", dtype=torch.float32, drift=0.3, reference=True, guided=guided
    )
    compare(there, here, config, torch.float32)
    if guided:
        loss, grads, *_ = go.guard_loss_and_grad(**there, config=config)
        with go.use_backend("reference"):
            expected = go.guard_loss_and_grad(**here, config=config)
        assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-4)
        for got, wanted in zip(grads, expected.grad, strict=True):
            assert relative(got.cpu(), wanted) < 1e-4


@pytest.mark.parametrize("mode", ["none", "article", "paper"])
def test_weights_and_statistics_from_elsewhere(mode, place):
    here, there = problem_on(place.device, "noise", dtype=torch.float32, drift=0.5)
    weights = torch.rand(3, 4)
    for name, config in (("step_weights", MODES[mode]), ("statistics", MODES["article"])):
        if name == "statistics" and mode != "article":
            continue
        more, more_there = {name: weights}, {name: weights.to(place.device)}
        if name == "statistics":
            with go.use_backend("reference"):
                ratio = go.log_ratio(**without_advantages(here)).log_ratio
            more = {name: go.RatioStatistics(3).update(ratio)}
            there_ratio = ratio.to(place.device)
            more_there = {name: go.RatioStatistics(3, place.device).update(there_ratio)}
        out, grad = run(there, config, **more_there)
        expected, expected_grad = truth(here, config, **more)
        assert out.loss.item() == pytest.approx(expected.loss.item(), abs=2e-5)
        assert relative(grad.cpu(), expected_grad) < 1e-4


@pytest.mark.parametrize(
    "form, dtype", values_first(itertools.product(["mean", "velocity", "noise", "seeded"], NARROW))
)
def test_on_policy_is_exactly_on_policy(form, dtype, place):
    if form == "mean":
        there = rollout_on(place.device, dtype, (41,))
    else:
        _, there = problem_on(place.device, form, dtype=dtype, latent=(41,), drift=0)
    # The sums are zero or not whatever the mode is: each of them in one dtype. Noise takes seconds.
    every = CUDA or (dtype == torch.float32 and form != "seeded")
    for mode in ("article", "paper", "none") if every else ("article",):
        out, grad = run(there, MODES[mode])
        assert torch.equal(out.log_ratio, torch.zeros_like(out.log_ratio))
        assert torch.equal(out.excess, torch.zeros_like(out.excess))
        assert grad.abs().max() > 0


@pytest.mark.parametrize("nonfinite", ["propagate", "drop"])
@pytest.mark.parametrize("mode", ["none", "article", "paper"])
def test_a_bad_transition_stays_alone(mode, nonfinite, place):
    """The others' gradients are those of ``reference``, which tests/test_nonfinite.py proves."""
    config = go.GuardConfig(**{**vars(MODES[mode]), "nonfinite": nonfinite})
    here, there = problem_on(place.device, "noise", dtype=torch.float32, latent=(37,), drift=0.4)
    here["model_output"][1, 2, 5] = math.nan
    there = moved(here, place.device)
    out, grad = run(there, config)
    expected, expected_grad = truth(here, config)
    assert out.metrics.nonfinite.tolist() == [0, 1, 0]
    grad, finite = grad.cpu(), torch.ones(3, 4, dtype=torch.bool)
    finite[1, 2] = False
    assert relative(grad[finite], expected_grad[finite]) < 1e-4
    assert largest(out.weights.cpu(), expected.weights) < 1e-5
    if nonfinite == "propagate":
        assert out.loss.isnan()
        assert grad[1, 2].isnan().all()
    else:
        assert out.loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
        assert torch.equal(grad[1, 2], torch.zeros(37))


@pytest.mark.parametrize("dtype", NARROW)
def test_a_trajectory_is_read_in_place(dtype, place):
    """Stored [B, K, ...]: no bit changes, and no copy of it is made."""
    _, there = problem_on(place.device, "velocity", dtype=dtype, latent=(16, 16), drift=0.3)
    out, grad = run(there, MODES["article"])
    strided = dict(there)
    for name in ("model_output", "sample", "prev_sample", "old_model_output"):
        strided[name] = there[name].transpose(0, 1).contiguous().transpose(0, 1)
    again, grad_again = run(strided, MODES["article"])
    assert torch.equal(out.loss, again.loss)
    assert torch.equal(grad, grad_again)


@pytest.mark.parametrize("form", FORMS)
def test_log_ratio_and_its_gradient(form, place):
    here, there = problem_on(place.device, form, dtype=torch.float32, latent=(4100,), drift=0.3)
    got, expected = [], []
    for given, out, backend in ((there, got, place.backend), (here, expected, "reference")):
        v = given["model_output"].detach().requires_grad_()
        with go.use_backend(backend):
            ratio = go.log_ratio(**{**without_advantages(given), "model_output": v})
        weight = torch.linspace(-1, 2, 12).reshape(3, 4).to(v.device)
        loss = (ratio.log_ratio * weight).sum()
        if form != "log-prob":
            loss = loss + (ratio.kl_old * weight**2).sum()
        loss.backward()
        out += [ratio.log_ratio.detach().cpu(), v.grad.cpu()]
    assert largest(got[0], expected[0]) < 1e-5
    assert relative(got[1], expected[1]) < 2e-5


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("source, guided", [("noise", False), ("noise", True), ("seed", False)])
def test_the_rollouts_step(source, guided, dtype, place):
    v, x, noise = (torch.randn(3, 4, 4100).to(dtype) for _ in range(3))
    seeds = go.philox_seed(9, (3, 4))
    coeffs = go.SdeSchedule([1.0, 0.8, 0.5, 0.2, 0.0])[:3]
    more = {"noise": noise} if source == "noise" else {"seed": seeds}
    if guided:  # a cond that makes the guided velocity about as large as v
        uncond = torch.randn(3, 4, 4100).to(dtype)
        v = (uncond + (v - uncond) / 2.5).to(dtype)
        more |= {"model_output_uncond": uncond, "guidance_scale": 2.5}
    there = {n: x.to(place.device) if isinstance(x, torch.Tensor) else x for n, x in more.items()}
    step = go.sde_step(v.to(place.device), x.to(place.device), coeffs.to(place.device), **there)
    with go.use_backend("reference"):
        expected = go.sde_step(v, x, coeffs, **more)
    assert step.mean.dtype == torch.float32
    assert largest(step.mean.cpu(), expected.mean) < 1e-6
    one = {torch.float32: 3e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    assert largest(step.prev_sample.cpu(), expected.prev_sample) <= 2 * one
    off = (step.prev_sample.cpu() != expected.prev_sample).float().mean()
    assert off < 0.01 or dtype == torch.float32  # a tie that rounds the other way is rare
    assert largest(step.log_prob.cpu(), expected.log_prob) < 2e-5


SHAPES = [(3, (50,)), (3, (2, 5, 5)), (None, (10, 5))]


@pytest.mark.parametrize(
    "steps, latent, factor, dtype",
    pairs_first(
        (
            (*shape, factor, dtype)
            for shape in SHAPES
            for factor in (1.0, -3.0, 0.0)
            for dtype in NARROW
        ),
        lambda steps, latent, factor, dtype: ((steps, latent), factor, dtype),
    ),
)
def test_backward_scales_what_forward_made(steps, latent, dtype, factor, place):
    here, there = problem_on(
        place.device, "mean", steps=steps, dtype=dtype, latent=latent, drift=0.3
    )
    v = there["model_output"].detach().requires_grad_()
    config = of_steps("article", steps)
    out = go.guard_loss(**{**there, "model_output": v}, config=config)
    (factor * out.loss).backward()
    _, expected = truth(here, config)
    assert relative(v.grad.cpu(), factor * expected) < ROUNDING[dtype]


def test_float64_runs_too_or_is_refused(place):
    here, there = problem_on(place.device, "velocity", dtype=torch.float64, drift=0.3)
    if place.backend == "cuda":
        with pytest.raises(TypeError, match="'cuda' backend has no float64 kernels"):
            run(there, MODES["article"])
        return
    out, grad = run(there, MODES["article"])
    expected, expected_grad = truth(here, MODES["article"])
    assert relative(out.excess.cpu(), expected.excess) < 1e-10
    assert relative(grad.cpu(), expected_grad) < 1e-10


def test_bad_input_is_refused_with_the_same_words(place):
    _, there = problem_on(place.device, "velocity", dtype=torch.float32)
    there["sample"] = there["sample"][..., :-1]
    with pytest.raises(ValueError, match=r"`sample` has shape \(3, 4, 6, 4\) but `model_output`"):
        run(there, MODES["article"])


def test_a_loss_in_parts_has_the_same_bits(place):
    """Ranks exchange numbers between them: sums, statistics, [K, B] arithmetic, gradient."""
    _, there = problem_on(place.device, dtype=torch.float32, latent=(5, 9), drift=0.3)
    latents, *rest = operands(there)
    t = Transitions(Latents._make(latents), *rest)
    advantages = torch.linspace(-2, 2, 12, dtype=torch.float64, device=place.device).view(3, 4)
    arguments = t, Rows(advantages, None, None, None, None), objective_of(MODES["article"], True)
    backend = select(place.device)
    loss, grad, _, per_row, metrics, sum_grads = backend.guard_loss(*arguments, True, False)
    sums = backend.sums(t)
    got = backend.evaluate(sums, *arguments)
    for part, whole in zip(got, (loss, per_row, metrics, sum_grads), strict=True):
        assert torch.equal(part, whole)
    assert relative(backend.gradient(t, got[-1])[0], grad) < 1e-6
    count, mean, root_m2, square, samples = backend.ratio_statistics(sums, *arguments)
    assert count.tolist() == samples.tolist() == [4.0] * 3
    assert (square > 0).all()
    assert torch.equal(mean.float(), metrics[0])
    torch.testing.assert_close((root_m2 / 2).float(), metrics[1])
