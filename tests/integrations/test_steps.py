"""The drop-in steps return what the originals do, value and gradient, and never ask the host."""

from __future__ import annotations

import io
from types import SimpleNamespace

import originals
import pytest
import torch
from combinations import values_first
from torch.utils._python_dispatch import TorchDispatchMode

from guard_ops.integrations import (
    dance_grpo,
    flow_factory,
    flow_grpo,
    flow_grpo_wan,
    steps,
    verl_omni,
)

BATCH, LATENT = 4, (4, 8, 8)
ROUNDING = 1e-6  # a few float32 roundings of numbers of order 1


def latents(*names):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(BATCH, *LATENT, generator=generator) for _ in names]


def timesteps(scheduler, mixed):
    return scheduler.timesteps[[0, 2, 4, 6] if mixed else [3, 3, 3, 3]]


def agree(ours, theirs, tolerance=ROUNDING):
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def call(framework, scheduler, kind, v, timestep, x, y, generator=None):
    """(prev_sample, log_prob, mean, std_dev_t, sqrt_dt) of a drop-in."""
    if framework == "flow_grpo":
        return flow_grpo.sde_step_with_logprob(
            scheduler, v, timestep, x, prev_sample=y, generator=generator,
            sde_type={"flow_sde": "sde"}.get(kind, kind), return_sqrt_dt=True,
        )  # fmt: skip
    if framework == "verl_omni":
        return verl_omni.sample_previous_step(
            scheduler, x, v, timestep, prev_sample=y, generator=generator,
            sde_type={"flow_sde": "sde"}.get(kind, kind), return_sqrt_dt=True,
        )  # fmt: skip
    dynamics = {"flow_sde": "Flow-SDE", "dance_sde": "Dance-SDE", "cps": "CPS"}[kind]
    scheduler.is_eval, scheduler.dynamics_type = False, dynamics
    y, mean, _, log_prob, std, dt = flow_factory.step(
        scheduler, v, timestep, x, next_latents=y, generator=generator, noise_level=0.7,
        return_dict=False,
    )  # fmt: skip
    return y, log_prob, mean, std, (-dt).sqrt()


CASES = [
    *(("flow_grpo", kind) for kind in ("flow_sde", "cps")),
    *((name, kind) for name in ("verl_omni", "flow_factory")
      for kind in ("flow_sde", "dance_sde", "cps")),
]  # fmt: skip


@pytest.mark.parametrize("mixed", [False, True], ids=["one timestep", "mixed timesteps"])
@pytest.mark.parametrize("framework, kind", CASES)
def test_update_is_the_originals(scheduler, framework, kind, mixed):
    v, x, y = latents("v", "x", "y")
    at = timesteps(scheduler, mixed)
    results = []
    for ours in (False, True):
        leaf = v.clone().requires_grad_()
        if ours:
            _, log_prob, mean, std, root = call(framework, scheduler, kind, leaf, at, x, y)
        else:
            out = originals.step(scheduler, kind, leaf, at, x, y)
            log_prob, mean, std, root = out[:4]
            if framework == "flow_factory" and kind == "dance_sde":
                std = std / root  # its std_dev_t leaves sqrt(-dt) out, in every kind of SDE
        (log_prob.sum() + mean.square().mean()).backward()
        results.append((log_prob.detach(), mean.detach(), std, root.flatten(), leaf.grad))
    for original, swapped in zip(*results, strict=True):
        agree(swapped, original, 3e-6)


@pytest.mark.parametrize("framework, kind", CASES)
def test_rollout_draws_the_originals_noise(scheduler, framework, kind):
    v, x = latents("v", "x")
    at = timesteps(scheduler, mixed=True)
    y, log_prob, mean, _, _ = call(
        framework, scheduler, kind, v, at, x, None, torch.Generator().manual_seed(5)
    )
    noise = torch.randn(v.shape, generator=torch.Generator().manual_seed(5))
    out = originals.step(scheduler, kind, v, at, x, y)
    agree(mean, out.prev_sample_mean)
    agree(y, out.prev_sample_mean + out.s * noise)
    agree(log_prob, out.log_prob)


@pytest.mark.parametrize("framework, kind", CASES)
def test_update_repeats_the_rollouts_log_prob_to_the_bit(scheduler, framework, kind):
    v, x = latents("v", "x")
    at = timesteps(scheduler, mixed=False)
    y, rollout, *_ = call(framework, scheduler, kind, v, at, x, None)
    _, update, *_ = call(framework, scheduler, kind, v.requires_grad_(), at, x, y)
    assert torch.equal(rollout, update.detach())


def test_flow_factory_scores_the_sample_as_it_is_stored(scheduler):
    v, x = (t.bfloat16() for t in latents("v", "x"))
    at = timesteps(scheduler, mixed=False)
    y, log_prob, *_ = call("flow_factory", scheduler, "flow_sde", v, at, x, None)
    assert torch.equal(y, y.bfloat16().float())
    out = originals.step(scheduler, "flow_sde", v, at, x, y)
    agree(log_prob, out.log_prob)


def test_flow_factory_steps_between_any_two_timesteps(scheduler):
    v, x, y = latents("v", "x", "y")
    scheduler.is_eval, scheduler.dynamics_type = False, "Flow-SDE"
    at = timesteps(scheduler, mixed=True)
    following = scheduler.timesteps[[1, 3, 5, 7]]
    found = flow_factory.step(
        scheduler, v, at, x, next_latents=y, timestep_next=following, noise_level=0.7,
        return_dict=False,
    )  # fmt: skip
    agree(found[3], originals.step(scheduler, "flow_sde", v, at, x, y).log_prob, 3e-6)


def flow_factory_step(scheduler, kind, v, at, x, y=None, **given):
    """next_latents, their mean, log_prob, std_dev_t, dt."""
    scheduler.is_eval = given.pop("is_eval", False)
    scheduler.dynamics_type = {"flow_sde": "Flow-SDE", "dance_sde": "Dance-SDE", "cps": "CPS"}[kind]
    given = {"noise_level": 0.7, **given}
    out = flow_factory.step(scheduler, v, at, x, next_latents=y, return_dict=False, **given)
    return out[0], out[1], out[3], out[4], out[5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
def test_flow_factory_evaluates_with_the_ode(scheduler, kind, dtype):
    """The original draws its noise all the same, and rounds to the dtype of the latents."""
    v, x = (t.to(dtype) for t in latents("v", "x"))
    generator, same = (torch.Generator().manual_seed(3) for _ in range(2))
    y, mean, log_prob, std, dt = flow_factory_step(
        scheduler, kind, v, scheduler.timesteps[2], x, is_eval=True, generator=generator
    )
    torch.randn(v.shape, generator=same)
    assert torch.equal(generator.get_state(), same.get_state())
    agree(mean, x.float() + v.float() * dt)
    assert torch.equal(y, mean.to(dtype).float())
    assert not std.any()
    if kind == "cps":
        agree(log_prob, -((y - mean) ** 2).mean((1, 2, 3)))
    else:
        assert not log_prob.isfinite().any()  # the original's is 0 / 0


def test_flow_factory_takes_a_steps_number(scheduler):
    v, x, y = latents("v", "x", "y")
    expected = flow_factory_step(scheduler, "flow_sde", v, scheduler.timesteps[2], x, y)
    for number in (2, torch.tensor(2), torch.tensor(2, dtype=torch.int32)):
        found = flow_factory_step(scheduler, "flow_sde", v, number, x, y)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_flow_factory_refuses_expanded_timesteps(scheduler):
    v, x, y = latents("v", "x", "y")
    with pytest.raises(ValueError, match=r"`timestep` has shape \(4, 7\); it needs \[\] or \[B\]"):
        flow_factory_step(scheduler, "flow_sde", v, torch.full((4, 7), 900.0), x, y)


LAST_STEP = [("flow_grpo", "cps"), ("verl_omni", "cps"), ("flow_factory", "cps")]


@pytest.mark.parametrize("framework, kind", LAST_STEP)
def test_the_last_step_of_cps_has_a_log_prob(scheduler, framework, kind):
    v, x, y = latents("v", "x", "y")
    at = scheduler.timesteps[[7, 7, 7, 7]]
    leaf = v.clone().requires_grad_()
    _, log_prob, mean, std, _ = call(framework, scheduler, kind, leaf, at, x, y)
    out = originals.step(scheduler, kind, v, at, x, y)
    assert not std.any()
    agree(log_prob, out.log_prob, 3e-6)
    agree(mean, out.prev_sample_mean)
    log_prob.sum().backward()
    assert leaf.grad.isfinite().all()
    assert leaf.grad.any()


@pytest.mark.parametrize("level", [1.2, 2.5])
@pytest.mark.parametrize("framework", ["flow_grpo", "verl_omni", "flow_factory"])
def test_cps_takes_a_noise_level_above_one(scheduler, framework, level):
    v, x, y = latents("v", "x", "y")
    at = timesteps(scheduler, mixed=True)
    if framework == "flow_grpo":
        found = flow_grpo.sde_step_with_logprob(
            scheduler, v, at, x, noise_level=level, prev_sample=y, sde_type="cps"
        )
    elif framework == "verl_omni":
        found = verl_omni.sample_previous_step(
            scheduler, x, v, at, noise_level=level, prev_sample=y, sde_type="cps"
        )
    else:
        y_, mean, log_prob, std, _ = flow_factory_step(
            scheduler, "cps", v, at, x, y, noise_level=level
        )
        found = y_, log_prob, mean, std
    out = originals.step(scheduler, "cps", v, at, x, y, noise_level=level)
    agree(found[1], out.log_prob, 3e-6)
    agree(found[2], out.prev_sample_mean)
    agree(found[3], out.std_dev_t)


@pytest.mark.parametrize("framework, kind", CASES)
def test_a_sample_that_requires_grad_gets_one(scheduler, framework, kind):
    v, x, y = latents("v", "x", "y")
    at = timesteps(scheduler, mixed=True)
    grads = []
    for ours in (False, True):
        leaves = [t.clone().requires_grad_() for t in (v, x)]
        if ours:
            _, log_prob, mean, _, _ = call(framework, scheduler, kind, leaves[0], at, leaves[1], y)
        else:
            log_prob, mean, *_ = originals.step(scheduler, kind, *_order(leaves, at, y))
        (log_prob.sum() + mean.square().mean()).backward()
        grads.append([log_prob.detach(), *(leaf.grad for leaf in leaves)])
    for original, swapped in zip(*grads, strict=True):
        agree(swapped, original, 5e-6)


def _order(leaves, at, y):
    return leaves[0], at, leaves[1], y


@pytest.mark.parametrize("solver", [True, False], ids=["sde_solver", "ode mean"])
@pytest.mark.parametrize("index", [3, torch.tensor(3)], ids=["int", "tensor"])
def test_flux_step_is_dance_grpos(scheduler, solver, index):
    v, x, y = latents("v", "x", "y")
    sigmas, eta = scheduler.sigmas, 0.3
    sigma, dt = sigmas[3], sigmas[4] - sigmas[3]
    grads = []
    for ours in (False, True):
        leaf = v.clone().requires_grad_()
        if ours:
            _, x0, log_prob = dance_grpo.flux_step(leaf, x, eta, sigmas, index, y, True, solver)
            mean, _ = dance_grpo.flux_step(leaf, x, eta, sigmas, index, None, False, solver)
            agree(x0, x - sigma * v)
        else:
            mean = x + dt * leaf
            if solver:
                score = -(x - (x - sigma * leaf) * (1 - sigma)) / sigma**2
                mean = mean - 0.5 * eta**2 * score * dt
            s = eta * (-dt).sqrt()
            log_prob = -((y - mean) ** 2) / (2 * s**2) - s.log() - 0.91893853320467
            log_prob = log_prob.mean((1, 2, 3))
        (log_prob.sum() + mean.sum()).backward()
        grads.append((log_prob.detach(), mean.detach(), leaf.grad))
    for original, swapped in zip(*grads, strict=True):
        agree(swapped, original, 2e-6)
    one = dance_grpo.grpo_one_step_log_prob(v, x, y, eta, sigmas, index)
    if solver:
        agree(one, log_prob.detach())


def test_a_negative_index_counts_sigmas_as_dance_grpo_does(scheduler):
    v, x, y = latents("v", "x", "y")
    sigmas = scheduler.sigmas
    for index in (-2, -5):
        expected = dance_grpo.flux_step(v, x, 0.3, sigmas, index + len(sigmas), y, True, True)
        for given in (index, torch.tensor(index)):
            found = dance_grpo.flux_step(v, x, 0.3, sigmas, given, y, True, True)
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match=r"`index` is -1; with 9 sigmas it needs 0 to 7"):
        dance_grpo.flux_step(v, x, 0.3, sigmas, -1, y, True, True)


class RefuseHost(TorchDispatchMode):
    """Fails on what waits for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name in ("aten::nonzero", "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero"):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("given", [True, False], ids=["update", "rollout"])
@pytest.mark.parametrize("framework", ["flow_grpo", "verl_omni", "flow_factory"])
def test_no_step_waits_for_the_device(scheduler, framework, given, monkeypatch):
    """On the CPU, where a bad timestep is an error of the host's, that check is taken out."""
    v, x, y = latents("v", "x", "y")
    at = timesteps(scheduler, mixed=True)
    y = y if given else None
    arguments = (framework, scheduler, "flow_sde", v, at, x, y)
    expected = call(*arguments, torch.Generator().manual_seed(2))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch, "_assert_async", lambda *_: None)
    with torch.no_grad(), RefuseHost():
        found = call(
            framework, scheduler, "flow_sde", v, at, x, y, torch.Generator().manual_seed(2)
        )
    monkeypatch.undo()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_refusing_the_host_refuses_diffusers_lookup(scheduler):
    with RefuseHost(), pytest.raises(AssertionError, match="waits for the device"):
        scheduler.index_for_timestep(scheduler.timesteps[2])


class Copies(TorchDispatchMode):
    """Counts what is copied from the CPU to a device, or back, of which the host would wait."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.name() in ("aten::_to_copy", "aten::copy_"):
            devices = {x.device.type for x in (*args, out) if isinstance(x, torch.Tensor)}
            self.count += len(devices) > 1
        return out


def test_a_scheduler_on_the_cpu_is_copied_to_the_device_once(scheduler, monkeypatch):
    """ "meta" stands for the accelerator; the values of its numbers nobody can read."""
    monkeypatch.setattr(torch, "_assert_async", lambda *_: None)
    for cached in (steps._copied, steps._moved, steps._known, steps._known_at, steps._schedule):
        cached.cache_clear()
    meta = torch.device("meta")
    x = torch.empty(BATCH, *LATENT, device=meta)
    timestep = torch.empty(BATCH, device=meta)
    scheduler.is_eval, scheduler.noise_level = False, 0.7
    scheduler.current_sde_steps = torch.arange(7)
    host, level = scheduler.timesteps[:BATCH], torch.full((BATCH,), 0.7)

    def once():
        sigmas, at = scheduler.sigmas, steps.index_for_timestep(scheduler.timesteps, timestep)
        assert at.device == meta
        for given in (timestep, host, 3):
            flow_factory._sigmas(scheduler, given, None, None, x)
            flow_factory._sigmas(scheduler, given, host, level, x)
        steps.top_where_one(timestep, sigmas[1])
        for index in (at, 3, (0, 1, 2, 3)):
            steps.coefficients(sigmas, index, level, "flow_sde", BATCH, meta)
            steps.coefficients(sigmas, index, level_there, "flow_sde", BATCH, meta)
            steps.coefficients(sigmas, index, 1.5, "cps", BATCH, meta)
        known = steps.coefficients_at(sigmas[1], sigmas[2], 0.7, "flow_sde", 0.99, BATCH)
        assert steps.coefficients_on(known, meta).device == meta

    level_there = level.to(meta)
    once()
    with Copies() as copies:
        once()
    assert copies.count == 0
    kept = steps._copied.cache_info().currsize
    scheduler.sigmas[1] -= 1e-3  # other values are another copy
    steps.on_device(scheduler.sigmas, meta)
    assert steps._copied.cache_info().currsize == kept + 1
    with Copies() as copies:
        scheduler.sigmas.to(meta)
    assert copies.count == 1


def test_sigmas_of_inference_mode_make_one_schedule(scheduler, monkeypatch):
    monkeypatch.setattr(steps, "_on_host", lambda x: False)  # as on an accelerator
    with torch.inference_mode():
        sigmas = scheduler.sigmas.clone()
    first = steps.schedule_of(sigmas, 0.7, "flow_sde", "cpu")
    assert steps.schedule_of(sigmas, 0.7, "flow_sde", "cpu") is first
    assert steps.schedule_of(sigmas, 0.5, "flow_sde", "cpu") is not first


def test_schedule_is_made_once_and_again_when_the_sigmas_change(scheduler):
    first = steps.schedule_of(scheduler.sigmas, 0.7, "flow_sde", "cpu")
    assert steps.schedule_of(scheduler.sigmas, 0.7, "flow_sde", "cpu") is first
    assert steps.schedule_of(scheduler.sigmas, 0.5, "flow_sde", "cpu") is not first
    scheduler.sigmas.data[1] -= 1e-3
    edited = steps.schedule_of(scheduler.sigmas, 0.7, "flow_sde", "cpu")
    assert edited is not first
    assert edited.sigmas == tuple(scheduler.sigmas.tolist())
    scheduler.sigmas[1] -= 1e-3
    assert steps.schedule_of(scheduler.sigmas, 0.7, "flow_sde", "cpu") is not first


@pytest.mark.parametrize(
    "framework, kind", values_first([*CASES, ("dance_grpo", "dance_sde"), ("wan", "wan_sde")])
)
def test_a_step_is_one_graph(scheduler, framework, kind):
    v, x, y = latents("v", "x", "y")
    at = timesteps(scheduler, mixed=True)
    sigmas = scheduler.sigmas

    def step(v, x, y):
        if framework == "dance_grpo":
            return dance_grpo.flux_step(v, x, 0.3, sigmas, 3, y, True, True)
        if framework == "wan":
            return flow_grpo_wan.sde_step_with_logprob(scheduler, v, at, x, y)
        return call(framework, scheduler, kind, v, at, x, y)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(v, x, y), step(v, x, y), strict=True):
        agree(found, expected, 3e-6)


def pinned(tensor):
    """What a tensor keeps besides itself: its attributes."""
    return [name for name in vars(tensor) if not name.startswith("__")] if vars(tensor) else []


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("framework, kind", CASES)
def test_a_mean_keeps_nothing_but_itself(scheduler, framework, kind, grad):
    """48 MiB for a mean of 16, and pickles that ``weights_only`` refuses, if it did."""
    v, x, y = latents("v", "x", "y")
    at = timesteps(scheduler, mixed=False)
    with torch.set_grad_enabled(grad):
        _, _, mean, *_ = call(framework, scheduler, kind, v, at, x, y)
    assert not pinned(mean)
    file = io.BytesIO()
    torch.save(mean, file)
    assert file.tell() < mean.nbytes + 4096
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), mean)


def test_noise_level_per_sample(scheduler):
    v, x, y = latents("v", "x", "y")
    at = timesteps(scheduler, mixed=True)
    levels = torch.tensor([0.7, 0.3, 0.5, 0.9])
    found = verl_omni.sample_previous_step(scheduler, x, v, at, prev_sample=y, noise_level=levels)
    for i, level in enumerate(levels.tolist()):
        row = slice(i, i + 1)
        one = originals.step(
            scheduler, "flow_sde", v[row], at[row], x[row], y[row], noise_level=level
        )
        agree(found[1][row], one.log_prob, 3e-6)


def test_verl_omni_without_the_normalizer_and_without_log_prob(scheduler):
    v, x, y = latents("v", "x", "y")
    at = timesteps(scheduler, mixed=True)
    out = originals.step(scheduler, "flow_sde", v, at, x, y)
    bare = verl_omni.sample_previous_step(
        scheduler, x, v, at, prev_sample=y, include_logprob_normalizer=False
    )[1]
    agree(bare, out.log_prob + out.s.flatten().log() + 0.91893853320467, 3e-6)
    none = verl_omni.sample_previous_step(
        scheduler, x, v, at, prev_sample=y, return_logprobs=False
    )[1]
    assert none is None


def test_bad_input_names_the_argument(scheduler):
    v, x, y = latents("v", "x", "y")
    with pytest.raises(ValueError, match=r"`sde_type` is 'ddim'; it needs one of sde, cps"):
        flow_grpo.sde_step_with_logprob(scheduler, v, scheduler.timesteps[:4], x, sde_type="ddim")
    with pytest.raises(ValueError, match=r"`timestep` has 1234.0, .* scheduler's 8 timesteps"):
        flow_grpo.sde_step_with_logprob(scheduler, v, torch.full((4,), 1234.0), x, prev_sample=y)
    with pytest.raises(NotImplementedError, match="per_token_timesteps"):
        verl_omni.sample_previous_step(scheduler, x, v, per_token_timesteps=x)
    other = SimpleNamespace(dynamics_type="DDIM", is_eval=False)
    with pytest.raises(ValueError, match=r"`dynamics_type` is 'DDIM'"):
        flow_factory.step(other, v, 1.0, x)
