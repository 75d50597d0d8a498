"""UniRL's transitions and Flow-DPPO's loss, against its arithmetic restated."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import restated
import torch

from guard_ops.integrations import unirl

BATCH, LATENT = 4, (4, 8, 8)
KINDS = ["flow", "dance", "cps"]


def latents(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(BATCH, *LATENT, generator=generator).to(dtype) for _ in range(count)]


def original(kind, v, x, sigma, following, eta, y):
    """A strategy's ``denoise``."""
    name = {"flow": "FlowSDEStrategy", "dance": "DanceSDEStrategy", "cps": "CPSSDEStrategy"}[kind]
    strategy = restated.unirl_strategies()[name]()
    return strategy.denoise(v, x, sigma, following, eta=eta, prev_sample=y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sigmas", [(0.8, 0.7), (1.0, 0.9), (0.999, 0.9), ([0.9, 0.5, 1.0, 0.3], None)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_replay_is_the_strategys(kind, sigmas, dtype):
    sigma = torch.tensor(sigmas[0], dtype=torch.float64)
    following = sigma - 0.1 if sigmas[1] is None else torch.tensor(sigmas[1], dtype=torch.float64)
    v, x, y = latents(3, dtype)
    y = y.float() + 1e-3  # not what a bf16 can hold
    results = []
    for ours in (False, True):
        leaf = v.float().requires_grad_()
        if ours:
            self = SimpleNamespace(canonical_name=kind)
            out = unirl.denoise(self, leaf, x, sigma, following, eta=0.7, prev_sample=y)
        else:
            out = original(kind, leaf, x, sigma, following, 0.7, y)
        (out[1].sum() + out[2].square().mean()).backward()
        results.append((*(t.detach() for t in out), leaf.grad))
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_scored_as_it_is_stored(kind):
    v, x = latents(2, torch.bfloat16)
    self, sigma = SimpleNamespace(canonical_name=kind), torch.tensor(0.8)
    y, log_prob, mean = unirl.denoise(self, v, x, sigma, sigma - 0.1, eta=0.7)
    assert torch.equal(y, y.bfloat16().float())
    expected = original(kind, v, x, sigma, sigma - 0.1, 0.7, y)
    torch.testing.assert_close(log_prob, expected[1], rtol=5e-6, atol=5e-6)
    torch.testing.assert_close(mean, expected[2], rtol=5e-6, atol=5e-6)


def test_without_eta_there_is_no_log_prob_and_no_rounding():
    v, x = latents(2, torch.bfloat16)
    self, sigma = SimpleNamespace(canonical_name="flow"), torch.tensor(0.8)
    y, log_prob, mean = unirl.denoise(self, v, x, sigma, sigma - 0.1, eta=0.0)
    assert log_prob is None
    assert torch.equal(y, mean)
    with pytest.raises(ValueError, match="the strategy is 'dpm2'; it needs one of flow, cps"):
        unirl.denoise(SimpleNamespace(canonical_name="dpm2"), v, x, sigma, sigma - 0.1)


SIGMA_SHAPES = {"a step": (1, 3), "a step, no batch": (3,), "a transition": (BATCH, 3), "all": ()}


@pytest.mark.parametrize("shape", SIGMA_SHAPES.values(), ids=SIGMA_SHAPES)
def test_flow_dppos_sigma_is_broadcast(shape):
    generator = torch.Generator().manual_seed(2)
    old = torch.randn(BATCH, 3, *LATENT, generator=generator)
    new = old + 0.01 * torch.randn(old.shape, generator=generator)
    log_prob, advantages = torch.randn(2, BATCH, 3, generator=generator)
    spread = 0.3 + torch.rand(shape, generator=generator)
    given = {
        "new_logp": log_prob + 0.01, "old_logp": log_prob, "new_means": new, "old_means": old,
        "advantages": advantages, "kl_mask_threshold": 2.4e-4,
    }  # fmt: skip
    sigma_t = spread.reshape(*shape, 1, 1, 1) if shape else spread
    theirs, ours = (
        loss(**given, sigma_t=sigma_t)
        for loss in (restated.flowdppo_loss(), unirl.flowdppo_kl_adv_loss)
    )
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[1]["kl_new_old_mean"], theirs[1]["kl_new_old_mean"])
    for wrong in ((3,), (1, 3), (8, 8), (2, 1, 1, 1), (1, 1, 3, 1, 1, 1)):
        with pytest.raises(ValueError, match=r"`sigma_t` has shape \("):
            unirl.flowdppo_kl_adv_loss(**given, sigma_t=torch.ones(wrong))


@pytest.mark.parametrize("steps", [3, 1])
def test_flow_dppo_is_unirls(steps):
    generator = torch.Generator().manual_seed(2)
    shape = (BATCH, steps, *LATENT)
    old_means = torch.randn(shape, generator=generator)
    new_means = old_means + 0.01 * torch.randn(shape, generator=generator)
    old_logp = torch.randn(BATCH, steps, generator=generator)
    drift = 0.01 * torch.randn(BATCH, steps, generator=generator)
    advantages = torch.randn(BATCH, 1, generator=generator).expand(BATCH, steps)
    sigma_t = torch.linspace(0.3, 0.6, steps).reshape(1, -1, 1, 1, 1)
    results = []
    for ours in (False, True):
        new_logp = (old_logp + drift).requires_grad_()
        if ours:
            losses, metrics = unirl.flowdppo_kl_adv_loss(
                new_logp=new_logp, old_logp=old_logp, new_means=new_means, old_means=old_means,
                advantages=advantages, sigma_t=sigma_t, kl_mask_threshold=2.4e-4,
            )  # fmt: skip
        else:
            losses, metrics = restated.flowdppo_loss()(
                new_logp=new_logp, old_logp=old_logp, new_means=new_means, old_means=old_means,
                advantages=advantages, sigma_t=sigma_t, kl_mask_threshold=2.4e-4,
            )  # fmt: skip
            if steps > 1:
                assert 0 < metrics["masked_fraction"] < metrics["kl_mask_fraction"] < 1
        losses.mean().backward()
        results.append((losses.detach(), new_logp.grad, metrics))
    (losses, grad, metrics), (ours, our_grad, our_metrics) = results
    assert sorted(our_metrics) == sorted(metrics)
    torch.testing.assert_close(ours, losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(our_grad, grad, rtol=1e-6, atol=1e-7)
    for name, value in metrics.items():
        torch.testing.assert_close(our_metrics[name], value, rtol=1e-5, atol=1e-6)
