"""A training step as each framework's script writes it, with its own arithmetic and swapped.

A rollout of six trained steps, then 20 optimizer steps over it (one timestep each, all samples),
AdamW at 3e-4 and gradient norm 1, as the scripts have it.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import originals
import pytest
import torch
import torch.utils.checkpoint

import guard_ops as go
from benchmarks import baselines
from guard_ops.integrations import dance_grpo, flow_factory, flow_grpo, verl_omni

LATENT, BATCH = (4, 8, 8), 6
CLIP, ADV_CLIP = 1e-4, 5.0
TRAINED = 6  # of the scheduler's 8
UPDATES = 20
VERL = SimpleNamespace(diffusion_loss=SimpleNamespace(clip_ratio=CLIP, adv_clip_max=ADV_CLIP))


class Rollout:
    """What a trainer stores: latents, log-probs and means of every step, made by the originals."""

    def __init__(self, scheduler, network, kind, noise_level):
        self.scheduler, self.kind, self.noise_level = scheduler, kind, noise_level
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(BATCH, *LATENT, generator=generator)
        self.latents, self.log_probs, self.means = [x], [], []
        self.advantages = torch.randn(BATCH, generator=generator)
        with torch.no_grad():
            for k in range(TRAINED):
                timestep = scheduler.timesteps[k].expand(BATCH)
                v = network(x, timestep)
                draw = torch.randn(x.shape, generator=generator)
                mean = self.original(v, timestep, x, x).prev_sample_mean
                s = self.original(v, timestep, x, x).s
                y = mean + s * draw
                self.log_probs.append(self.original(v, timestep, x, y).log_prob)
                self.means.append(mean)
                self.latents.append(y)
                x = y

    def original(self, v, timestep, x, y):
        return originals.step(self.scheduler, self.kind, v, timestep, x, y, self.noise_level)

    def step(self, k):
        timestep = self.scheduler.timesteps[k].expand(BATCH)
        return timestep, self.latents[k], self.latents[k + 1], self.log_probs[k], self.means[k]


def flow_grpo_original(r, v, k):
    timestep, x, y, old, _ = r.step(k)
    out = r.original(v, timestep, x, y)
    loss = baselines.flow_grpo_loss(out.log_prob, old, r.advantages, CLIP, ADV_CLIP)
    return loss, torch.expm1(out.log_prob - old).detach()


def flow_grpo_swapped(r, v, k):
    timestep, x, y, old, _ = r.step(k)
    _, log_prob, _, _ = flow_grpo.sde_step_with_logprob(
        r.scheduler, v, timestep, x, prev_sample=y, sde_type="cps" if r.kind == "cps" else "sde"
    )
    found = flow_grpo.grpo_loss(log_prob, old, r.advantages, clip_range=CLIP, adv_clip_max=ADV_CLIP)
    return found.loss, found.info["ratio_bias"]


def guard_original(loss_of):
    def run(r, v, k):
        timestep, x, y, old, old_mean = r.step(k)
        out = r.original(v, timestep, x, y)
        return loss_of(out, old, old_mean, r.advantages, CLIP, ADV_CLIP), None

    return run


def flow_grpo_guard_swapped(bias_reduction):
    def run(r, v, k):
        timestep, x, y, old, old_mean = r.step(k)
        _, log_prob, mean, std, root = flow_grpo.sde_step_with_logprob(
            r.scheduler, v, timestep, x, prev_sample=y, return_sqrt_dt=True
        )
        found = flow_grpo.grpo_guard_loss(
            log_prob, old, mean, old_mean, std, root, r.advantages,
            clip_range=CLIP, adv_clip_max=ADV_CLIP, bias_reduction=bias_reduction,
        )  # fmt: skip
        return found.loss, None

    return run


def dance_original(r, v, k):
    timestep, x, y, old, _ = r.step(k)
    out = r.original(v, timestep, x, y)
    return baselines.dance_grpo_loss(out.log_prob, old, r.advantages, CLIP, ADV_CLIP, 2), None


def dance_swapped(r, v, k):
    _, x, y, old, _ = r.step(k)
    _, _, log_prob = dance_grpo.flux_step(v, x, r.noise_level, r.scheduler.sigmas, k, y, True, True)
    loss = dance_grpo.grpo_loss(
        log_prob, old, r.advantages, clip_range=CLIP, adv_clip_max=ADV_CLIP,
        gradient_accumulation_steps=1, train_timesteps=2,
    )  # fmt: skip
    return loss, None


def verl_step(r, v, k):
    timestep, x, y, old, old_mean = r.step(k)
    kind = {"flow_sde": "sde"}.get(r.kind, r.kind)
    out = verl_omni.sample_previous_step(
        r.scheduler, x, v, timestep, noise_level=r.noise_level, prev_sample=y, sde_type=kind,
        return_sqrt_dt=True,
    )  # fmt: skip
    return out[1:], old, old_mean


def verl_flow_grpo_swapped(r, v, k):
    (log_prob, *_), old, _ = verl_step(r, v, k)
    loss, metrics = verl_omni.FlowGRPOFusedLoss.compute_loss(
        old_log_prob=old, log_prob=log_prob, advantages=r.advantages, config=VERL
    )
    return loss, metrics["actor/ratio_mean"] - 1


def verl_guard_swapped(r, v, k):
    (log_prob, mean, std, root), old, old_mean = verl_step(r, v, k)
    loss, _ = verl_omni.GRPOGuardFusedLoss.compute_loss(
        old_log_prob=old, log_prob=log_prob, advantages=r.advantages, config=VERL,
        old_prev_sample_mean=old_mean, prev_sample_mean=mean, std_dev_t=std, sqrt_dt=root,
    )  # fmt: skip
    return loss, None


def flow_factory_swapped(r, v, k):
    timestep, x, y, old, old_mean = r.step(k)
    r.scheduler.is_eval, r.scheduler.dynamics_type = False, "Flow-SDE"
    _, mean, _, log_prob, std, dt = flow_factory.step(
        r.scheduler, v, timestep, x, next_latents=y, noise_level=r.noise_level, return_dict=False
    )
    found = flow_factory.grpo_guard_loss(
        log_prob, old, mean, old_mean, std, dt, r.advantages,
        clip_range=(-CLIP, CLIP), adv_clip_range=(-ADV_CLIP, ADV_CLIP),
    )  # fmt: skip
    return found.loss, None


CASES = {
    "flow_grpo, sde": ("flow_sde", flow_grpo_original, flow_grpo_swapped),
    "flow_grpo, cps": ("cps", flow_grpo_original, flow_grpo_swapped),
    "flow_grpo, published guard": (
        "flow_sde",
        guard_original(originals.flow_grpo_guard),
        flow_grpo_guard_swapped("batch"),
    ),
    "flow_grpo, guard per sample": (
        "flow_sde",
        guard_original(baselines.grpo_guard_loss),
        flow_grpo_guard_swapped("sample"),
    ),
    "dance_grpo": ("dance_sde", dance_original, dance_swapped),
    "verl_omni, flow_grpo": ("flow_sde", flow_grpo_original, verl_flow_grpo_swapped),
    "verl_omni, guard": (
        "flow_sde",
        guard_original(baselines.grpo_guard_loss),
        verl_guard_swapped,
    ),
    "verl_omni, guard over dance_sde": (
        "dance_sde",
        guard_original(baselines.grpo_guard_loss),
        verl_guard_swapped,
    ),
    "flow_factory, guard": (
        "flow_sde",
        guard_original(originals.flow_factory_guard),
        flow_factory_swapped,
    ),
}


def moved(network):
    """The policy a few updates after the rollout."""
    other = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return other


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_of_every_step(scheduler, network, name):
    """Both round once per float32 operator. Measured: losses of order 1 within 8e-7, gradients
    within 3e-6 (relative norm)."""
    kind, original, swapped = CASES[name]
    rollout, policy = Rollout(scheduler, network, kind, 0.7), moved(network)
    for k in range(TRAINED):
        timestep, x, *_ = rollout.step(k)
        results = []
        for loss_of in (original, swapped):
            loss, _ = loss_of(rollout, policy(x, timestep), k)
            results.append((loss, torch.autograd.grad(loss, list(policy.parameters()))))
        (loss, grads), (ours, our_grads) = results
        torch.testing.assert_close(ours, loss, rtol=2e-6, atol=2e-6)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        difference = torch.cat([(p - q).flatten() for p, q in zip(grads, our_grads, strict=True)])
        assert difference.norm() <= 1e-5 * norm


@pytest.mark.parametrize("name", CASES)
def test_weights_after_20_optimizer_steps(scheduler, network, name):
    kind, original, swapped = CASES[name]
    rollout = Rollout(scheduler, network, kind, 0.7)
    ends = []
    for loss_of in (original, swapped):
        policy = copy.deepcopy(network)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-4)
        for update in range(UPDATES):
            k = update % TRAINED
            timestep, x, *_ = rollout.step(k)
            loss, _ = loss_of(rollout, policy(x, timestep), k)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    start = torch.cat([p.detach().flatten() for p in network.parameters()])
    assert (ends[0] - start).abs().max() > 1e-3  # it trains
    assert (ends[0] - ends[1]).abs().max() < 1e-6  # measured: 5e-8


@pytest.mark.parametrize("name", ["flow_grpo, sde", "verl_omni, flow_grpo"])
def test_ratio_metric_is_the_originals(scheduler, network, name):
    kind, original, swapped = CASES[name]
    rollout, policy = Rollout(scheduler, network, kind, 0.7), moved(network)
    timestep, x, *_ = rollout.step(4)
    _, ratio = original(rollout, policy(x, timestep), 4)
    _, ours = swapped(rollout, policy(x, timestep), 4)
    assert abs(float(ours) - ratio.mean().item()) < 1e-6


def test_verl_omni_metrics(scheduler, network):
    rollout, policy = Rollout(scheduler, network, "flow_sde", 0.7), moved(network)
    timestep, x, *_ = rollout.step(4)
    v = policy(x, timestep)
    _, ratio = flow_grpo_original(rollout, v, 4)
    (log_prob, *_), old, _ = verl_step(rollout, v, 4)
    _, metrics = verl_omni.FlowGRPOFusedLoss.compute_loss(
        old_log_prob=old, log_prob=log_prob, advantages=rollout.advantages, config=VERL
    )
    for name, value in originals.metrics(ratio.double(), CLIP).items():
        assert abs(metrics[name] - value) < 1e-6, name


def test_rejected_samples_have_no_weight(scheduler, network):
    rollout, policy = Rollout(scheduler, network, "flow_sde", 0.7), moved(network)
    (log_prob, *_), old, _ = verl_step(
        rollout, policy(rollout.latents[4], scheduler.timesteps[4]), 4
    )
    weights = torch.tensor([1.0, 0, 1, 1, 0, 2])
    loss, _ = verl_omni.FlowGRPOFusedLoss.compute_loss(
        old_log_prob=old, log_prob=log_prob, advantages=rollout.advantages, config=VERL,
        rollout_is_weights=weights,
    )  # fmt: skip
    ratio = torch.exp(log_prob - old)
    expected = originals.surrogate(ratio, rollout.advantages, CLIP, CLIP) * weights
    torch.testing.assert_close(loss, expected.mean(), rtol=1e-5, atol=1e-6)


def on_policy(rollout, network, k):
    timestep, x, y, old, _ = rollout.step(k)
    with torch.no_grad():
        v_old = network(x, timestep)
        coeffs = go.SdeSchedule.from_scheduler(rollout.scheduler)[k]
        noise = torch.zeros_like(x)
        old_mean = go.sde_step(v_old, x, coeffs, noise=noise).mean
    return timestep, x, y, old, old_mean


def test_guard_ratio_is_one_on_policy(scheduler, network):
    """But for the rounding of float32 means, whose squared difference counts."""
    rollout = Rollout(scheduler, network, "flow_sde", 0.7)
    for k in range(TRAINED):
        timestep, x, y, old, old_mean = on_policy(rollout, network, k)
        v = network(x, timestep)
        out = verl_omni.sample_previous_step(
            scheduler, x, v, timestep, prev_sample=y, return_sqrt_dt=True
        )
        _, metrics = verl_omni.GRPOGuardFusedLoss.compute_loss(
            old_log_prob=old, log_prob=out[1], advantages=rollout.advantages, config=VERL,
            old_prev_sample_mean=old_mean, prev_sample_mean=out[2], std_dev_t=out[3],
            sqrt_dt=out[4],
        )  # fmt: skip
        assert abs(metrics["actor/ratio_mean"] - 1.0) < 1e-7  # of float32 log-probs times scale
        assert metrics["actor/ratio_std"] < 1e-7


def guard_loss_of(rollout, policy, k, *, edit=None, shift=0.0, checkpoint=None):
    """flow_grpo's GRPO-Guard tail on what the step returned, the original's and ours."""
    timestep, x, y, old, old_mean = rollout.step(k)
    losses, grads = [], []
    for ours in (False, True):
        if ours:

            def step(v):
                out = flow_grpo.sde_step_with_logprob(
                    rollout.scheduler, v, timestep, x, prev_sample=y, return_sqrt_dt=True
                )
                return out[1:]
        else:

            def step(v):
                out = rollout.original(v, timestep, x, y)
                return out.log_prob, out.prev_sample_mean, out.std_dev_t, out.sqrt_dt

        v = policy(x, timestep).detach().requires_grad_()
        log_prob, mean, std, root = checkpoint(step, v) if checkpoint else step(v)
        if edit is not None:
            mean = edit(mean)
        if ours:
            loss = flow_grpo.grpo_guard_loss(
                log_prob + shift, old, mean, old_mean, std, root, rollout.advantages,
                clip_range=1.0,
            ).loss  # fmt: skip
        else:
            out = baselines.StepOutput(log_prob + shift, mean, std, root, std * root)
            loss = baselines.grpo_guard_loss(out, old, old_mean, rollout.advantages, 1.0, ADV_CLIP)
        losses.append(loss.detach())
        loss.backward()  # reentrant checkpointing knows no torch.autograd.grad
        grads.append(v.grad)
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-6, atol=2e-6)
    assert (grads[1] - grads[0]).norm() <= 1e-5 * grads[0].norm()
    assert grads[0].any()
    return losses[0]


def test_an_edited_mean_counts(scheduler, network):
    """A first frame that is clamped, in place as it is written."""
    rollout, policy = Rollout(scheduler, network, "flow_sde", 0.7), moved(network)

    def clamp(mean):
        mean[:, :, :2] = 0.25
        return mean

    assert guard_loss_of(rollout, policy, 3) != guard_loss_of(rollout, policy, 3, edit=clamp)


def test_a_log_prob_that_is_passed_counts(scheduler, network):
    rollout, policy = Rollout(scheduler, network, "flow_sde", 0.7), moved(network)
    assert guard_loss_of(rollout, policy, 3) != guard_loss_of(rollout, policy, 3, shift=0.01)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_keeps_the_gradient(scheduler, network, reentrant):
    rollout, policy = Rollout(scheduler, network, "flow_sde", 0.7), moved(network)
    guard_loss_of(
        rollout,
        policy,
        3,
        checkpoint=lambda step, v: torch.utils.checkpoint.checkpoint(
            step, v, use_reentrant=reentrant
        ),
    )


def test_a_mean_from_elsewhere_is_the_originals_arithmetic(scheduler, network):
    rollout, policy = Rollout(scheduler, network, "flow_sde", 0.7), moved(network)
    timestep, x, y, old, old_mean = rollout.step(3)
    out = rollout.original(policy(x, timestep), timestep, x, y)
    expected = baselines.grpo_guard_loss(out, old, old_mean, rollout.advantages, CLIP, ADV_CLIP)
    loss, _ = verl_omni.GRPOGuardFusedLoss.compute_loss(
        old_log_prob=old, log_prob=out.log_prob, advantages=rollout.advantages, config=VERL,
        old_prev_sample_mean=old_mean, prev_sample_mean=out.prev_sample_mean,
        std_dev_t=out.std_dev_t, sqrt_dt=out.sqrt_dt,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_averaged_scale_over_mixed_timesteps(scheduler, network):
    """The frameworks' one scale for a batch whose samples are at different timesteps."""
    policy = moved(network)
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(BATCH, *LATENT, generator=generator) for _ in range(2))
    timestep, advantages = scheduler.timesteps[:BATCH], torch.randn(BATCH, generator=generator)
    with torch.no_grad():
        before = originals.step(scheduler, "flow_sde", network(x, timestep), timestep, x, y)
    v = policy(x, timestep)
    out = originals.step(scheduler, "flow_sde", v, timestep, x, y)
    expected = baselines.grpo_guard_loss(
        out, before.log_prob, before.prev_sample_mean, advantages, 0.2, ADV_CLIP
    )
    _, log_prob, mean, std, root = flow_grpo.sde_step_with_logprob(
        scheduler, v, timestep, x, prev_sample=y, return_sqrt_dt=True
    )
    found = flow_grpo.grpo_guard_loss(
        log_prob, before.log_prob, mean, before.prev_sample_mean, std, root, advantages,
        clip_range=0.2,
    )  # fmt: skip
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-5)


def test_kl_is_flow_grpos_without_dt(scheduler, network):
    from guard_ops.integrations.guard import kl_to_reference

    rollout, policy = Rollout(scheduler, network, "flow_sde", 0.7), moved(network)
    timestep, x, y, _, _ = rollout.step(3)
    out = rollout.original(policy(x, timestep), timestep, x, y)
    ref = rollout.original(network(x, timestep), timestep, x, y).prev_sample_mean.detach()
    square = (out.prev_sample_mean - ref) ** 2
    expected = (square.mean((1, 2, 3), keepdim=True) / (2 * out.std_dev_t**2)).mean()
    _, _, mean, std = flow_grpo.sde_step_with_logprob(
        scheduler, policy(x, timestep), timestep, x, prev_sample=y
    )
    torch.testing.assert_close(kl_to_reference(mean, ref, std), expected, rtol=1e-5, atol=0)


def test_guard_loss_of_a_dance_rollout_that_kept_its_velocity(scheduler, network):
    rollout, policy = Rollout(scheduler, network, "dance_sde", 0.3), moved(network)
    timestep, x, y, _, _ = rollout.step(2)
    old_v, v = network(x, timestep).detach(), policy(x, timestep)
    config = go.GuardConfig.article(balance="none")
    found = dance_grpo.guard_loss(
        v, x, y, old_v, rollout.advantages, 0.3, scheduler.sigmas, 2, config
    )
    coeffs = go.SdeSchedule.from_scheduler(scheduler, 0.3, "dance_sde")[2]
    expected = go.guard_loss(
        v, advantages=rollout.advantages, coeffs=coeffs, config=config, sample=x, prev_sample=y,
        old_model_output=old_v,
    )  # fmt: skip
    assert torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize("steps", [range(TRAINED), [1, 3, 4]], ids=["all", "some"])
def test_all_steps_at_once_in_micro_batches(scheduler, network, steps):
    """docs/swap-in.md: velocities without a graph, one objective, backward by micro-batch."""
    rollout, policy = Rollout(scheduler, network, "flow_sde", 0.7), moved(network)
    schedule = go.SdeSchedule.from_scheduler(scheduler, 0.7)
    config = go.GuardConfig.article()
    given = {
        "advantages": rollout.advantages, "coeffs": schedule[list(steps)], "config": config,
        "sample": torch.stack([rollout.latents[k] for k in steps]),
        "prev_sample": torch.stack([rollout.latents[k + 1] for k in steps]),
        "old_mean": torch.stack([rollout.means[k] for k in steps]),
    }  # fmt: skip

    def velocity(k, rows):
        timestep, x, *_ = rollout.step(k)
        return policy(x[rows], timestep[rows])

    whole = go.guard_loss(torch.stack([velocity(k, slice(None)) for k in steps]), **given)
    whole.loss.backward()
    expected = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    with torch.no_grad():
        velocities = torch.stack([velocity(k, slice(None)) for k in steps])
    out = go.guard_loss_and_grad(velocities, **given)
    for n, k in enumerate(steps):
        for rows in (slice(0, 2), slice(2, BATCH)):
            velocity(k, rows).backward(out.grad[n, rows])
    for parameter, grad in zip(policy.parameters(), expected, strict=True):
        assert (parameter.grad - grad).norm() <= 1e-5 * grad.norm()
    assert (
        whole.weights - 1 / len(steps)
    ).abs().max() > 1e-3  # which one step a call does not have


def test_dance_grpos_shuffled_steps_are_put_back():
    """docs/swap-in.md: the script permutes each sample's steps, [B, T]."""
    stored = torch.randn(4, 6, 2)
    perms = torch.stack([torch.randperm(6) for _ in range(4)])
    each = torch.arange(4)[:, None]
    shuffled = stored[each, perms]
    assert torch.equal(shuffled[each, perms.argsort(1)], stored)
