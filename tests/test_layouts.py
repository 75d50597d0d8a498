"""Trajectories as trainers store them are read in place, and what the loss allocates."""

import itertools

import pytest
import torch
from combinations import pairs_first
from problems import FORMS, arguments, problem, relative, run, schedule, without_advantages

import guard_ops as go
from guard_ops import backends
from guard_ops.transitions import Latents

LATENTS = Latents._fields
CONFIG = go.GuardConfig.article(kl_beta=0.1)


def whole(form, **more):
    """Every optional operand at once."""
    return problem(form, guided=True, reference=True, dtype=torch.float32, **more)


def relaid(given, lay):
    """``given`` with the latents laid out by ``lay``; equal in value."""
    out = {n: lay(x) if n in LATENTS else x for n, x in given.items()}
    for name in LATENTS:
        if name in given:
            assert torch.equal(out[name], given[name])
            assert out[name].stride() != given[name].stride()
    return out


def batch_first(x):
    """[K, B, ...] as a view of a trajectory stored [B, K, ...]."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def inside_a_larger_one(x):
    """Some steps and samples of a longer trajectory of a larger batch."""
    big = torch.zeros(2 * x.shape[0], 3 * x.shape[1], *x.shape[2:], dtype=x.dtype)
    view = big[1::2, 2::3]
    view.copy_(x)
    return view


def not_dense(x):
    """Latents stored channels-last."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("lay", [batch_first, inside_a_larger_one, not_dense])
@pytest.mark.parametrize("form", FORMS)
def test_the_layout_changes_no_bit(form, lay, backend):
    given = whole(form)
    expected, expected_grad = run(given, CONFIG)
    out, grad = run(relaid(given, lay), CONFIG)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.excess, expected.excess)
    assert torch.equal(grad, expected_grad)


class Spy:
    """Stands before a function of the backend and keeps the operands that reach it."""

    def __init__(self, monkeypatch, backend):
        module = backends._loaded[backend]
        self.seen = []
        for name in ("sums", "guard_loss", "gradient"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, self._before(getattr(module, name)))

    def _before(self, function):
        def call(t, *rest, **options):
            self.seen.append(t)
            return function(t, *rest, **options)

        return call


@pytest.mark.parametrize("lay", [batch_first, inside_a_larger_one])
@pytest.mark.parametrize("form", FORMS)
def test_dense_latents_reach_the_kernels_uncopied(form, lay, backend, monkeypatch):
    given = relaid(whole(form), lay)
    spy = Spy(monkeypatch, backend)
    run(given, CONFIG)
    go.log_ratio(**without_advantages(arguments(given, ref_model_output=None)))
    assert len(spy.seen) >= 2
    for t in spy.seen:
        for name in LATENTS:
            operand = getattr(t.latents, name)
            if operand is not None:
                assert operand.data_ptr() == given[name].data_ptr(), name
                assert operand.shape == (3, 4, 30)


def test_only_a_latent_that_is_not_dense_is_copied(backend, monkeypatch):
    given = whole("velocity")
    given["sample"] = not_dense(given["sample"])
    spy = Spy(monkeypatch, backend)
    run(given, CONFIG)
    for name in LATENTS:
        operand = getattr(spy.seen[0].latents, name)
        if operand is not None:
            copied = operand.data_ptr() != given[name].data_ptr()
            assert copied == (name == "sample"), name


def test_one_step_of_a_trajectory_is_read_in_place(backend, monkeypatch):
    """``x[:, k]`` of trajectories stored [B, K, ...]: what a loop over steps passes."""
    given = problem("velocity", dtype=torch.float32)
    stored = {n: x.transpose(0, 1).contiguous() for n, x in given.items() if n in LATENTS}
    weights = torch.rand(3, 4)
    out, grad = run(given, go.GuardConfig.paper(), step_weights=weights)
    spy = Spy(monkeypatch, backend)
    for k in range(3):
        step = {n: x[:, k] for n, x in stored.items()}
        step |= {"advantages": given["advantages"], "coeffs": schedule()[1 + k]}
        part, part_grad = run(step, go.GuardConfig.paper(), step_weights=weights[k])
        assert torch.equal(part.log_ratio, out.log_ratio[k])
        assert torch.equal(part.excess, out.excess[k])
        assert torch.equal(part_grad, grad[k])
        assert spy.seen[-1].latents.sample.data_ptr() == stored["sample"][:, k].data_ptr()


@pytest.mark.parametrize("form", FORMS)
def test_expanded_operands(form, backend):
    """A start shared by the whole group, advantages per sample, a reference for all steps."""
    given = whole(form)
    for name in ("sample", "noise", "old_model_output", "ref_model_output"):
        if name in given:
            given[name] = given[name][:, :1].expand_as(given["model_output"])
    given["advantages"] = given["advantages"][:1].expand(3, 4)
    dense = {n: x.contiguous() if torch.is_tensor(x) else x for n, x in given.items()}
    expected, expected_grad = run(dense, CONFIG)
    out, grad = run(given, CONFIG)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(grad, expected_grad)


def test_an_expanded_velocity_sums_its_gradient(backend):
    """autograd's expand adds up what the loss gives each copy: nothing is written twice."""
    given = problem("velocity")
    one = given["model_output"][:, :1].clone().requires_grad_()
    go.guard_loss(**{**given, "model_output": one.expand(3, 4, 6, 5)}).loss.backward()
    copies = one.detach().expand(3, 4, 6, 5).contiguous()
    _, expected = run({**given, "model_output": copies})
    assert relative(one.grad, expected.sum(1, keepdim=True)) < 1e-14


@pytest.mark.parametrize("form", FORMS)
def test_one_step_is_a_trajectory_of_one(form, backend):
    given = problem(form, steps=None)
    config = go.GuardConfig()
    out, grad = run(given, config)
    batched = {
        n: x.unsqueeze(0) for n, x in given.items() if n in (*LATENTS, "old_log_prob", "seed")
    }
    rest = {"advantages": given["advantages"], "coeffs": schedule()[1:2]}
    expected, expected_grad = run(batched | rest, config)
    assert out.excess.shape == out.log_ratio.shape == out.weights.shape == (4,)
    assert all(value.shape == () for value in out.metrics)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.excess, expected.excess[0])
    assert torch.equal(grad, expected_grad[0])
    for got, wanted in zip(out.metrics, expected.metrics, strict=True):
        assert torch.equal(got.nan_to_num(7.0), wanted[0].nan_to_num(7.0))


def test_coefficients_per_transition(backend):
    """Samples of a row at different timesteps: each has its own; groups stay the rows."""
    index = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4], [4, 0, 2, 1]])
    coeffs = schedule()[index]
    assert coeffs.shape == (3, 4)
    given = problem("velocity")
    given["coeffs"] = coeffs
    config = go.GuardConfig.paper(clip_low=0.2, clip_high=0.2)
    out, grad = run(given, config)
    for k in range(3):
        for i in range(4):
            one = {n: x[k : k + 1, i : i + 1] for n, x in given.items() if n in LATENTS}
            one |= {"advantages": given["advantages"][i : i + 1]}
            one |= {"coeffs": schedule()[int(index[k, i]) : int(index[k, i]) + 1]}
            part, part_grad = run(one, config)
            assert relative(out.excess[k, i], part.excess[0, 0]) < 1e-12
            # One sample of one step: weights 1/(K |dt|) and means over B differ by K B.
            assert relative(12 * grad[k, i], part_grad[0, 0]) < 1e-12
    # Equal timesteps in a row are the [K] coefficients.
    rows = schedule()[torch.tensor([[1] * 4, [2] * 4, [3] * 4])]
    expected, expected_grad = run({**given, "coeffs": schedule()[1:4]})
    out, grad = run({**given, "coeffs": rows})
    assert torch.equal(out.excess, expected.excess)
    assert torch.equal(grad, expected_grad)


def test_advantages_per_transition(backend):
    given = problem("velocity")
    expected, expected_grad = run(given)
    given["advantages"] = given["advantages"].expand(3, 4)
    out, grad = run(given)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(grad, expected_grad)
    given["advantages"] = torch.randn(3, 4, dtype=torch.float64)
    _, grad = run(given)
    assert relative(grad, expected_grad) > 0.1


def test_seeds_are_read_through_their_strides(backend):
    given = problem("seeded")
    expected, expected_grad = run(given)
    given["seed"] = given["seed"].transpose(0, 1).contiguous().transpose(0, 1)
    out, grad = run(given)
    assert torch.equal(out.excess, expected.excess)
    assert torch.equal(grad, expected_grad)


def peak_of(function):
    """The most bytes that torch's CPU allocator had given out at once during ``function``."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        keep = function()
    events = profile.profiler.kineto_results.events()
    allocations = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = peak = 0
    for _, size in sorted(allocations, key=lambda event: event[0]):
        held += size
        peak = max(peak, held)
    del keep
    return peak


def test_the_measure_of_memory_sees_a_temporary():
    x = torch.zeros(1 << 20)
    assert 8 << 20 <= peak_of(lambda: ((x + 1) * 2).sum()) <= (8 << 20) + 4096
    assert peak_of(lambda: x.add_(1).sum()) <= 4096


@pytest.mark.parametrize(
    "form, config, dtype",
    pairs_first(
        itertools.product(
            FORMS, ["article", "paper"], [torch.float32, torch.bfloat16, torch.float16]
        )
    ),
)
def test_loss_and_backward_allocate_the_gradient_and_little_more(
    form, config, dtype, fused_backend
):
    """Issue 2's bound: the gradient plus at most 1 MB, whatever the number of temporaries."""
    if form == "log-prob":
        config = "article"
    given = relaid(problem(form, steps=4, batch=8, latent=(1024, 32), dtype=dtype), batch_first)
    v = given["model_output"].detach().requires_grad_()

    def step():
        out = go.guard_loss(
            **{**given, "model_output": v}, config=getattr(go.GuardConfig, config)()
        )
        (128.0 * out.loss).backward()
        return out

    step()
    v.grad = None
    peak = peak_of(step)
    gradient = v.numel() * v.element_size()
    assert gradient <= peak <= gradient + (1 << 20)
