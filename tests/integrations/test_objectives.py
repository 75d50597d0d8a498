"""examples/objectives.py: values and gradients against the formulas written out in float64."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch

import guard_ops as go

PATH = Path(__file__).parents[2] / "examples" / "objectives.py"
spec = importlib.util.spec_from_file_location("objectives", PATH)
objectives = importlib.util.module_from_spec(spec)
spec.loader.exec_module(objectives)

STEPS, BATCH, LATENT = 3, 6, (2, 4, 4)


def problem():
    generator = torch.Generator().manual_seed(5)
    coeffs = go.SdeSchedule(torch.linspace(1, 0, 9), noise_level=0.7)[1 : 1 + STEPS]
    v_old, x, noise, drift = (
        torch.randn(STEPS, BATCH, *LATENT, generator=generator, dtype=torch.float64)
        for _ in range(4)
    )
    y = go.sde_step(v_old, x, coeffs, noise=noise).prev_sample
    advantages = torch.tensor([1.0, -2.0, 0.5, -0.5, 3.0, -4.0], dtype=torch.float64)
    return coeffs, v_old, v_old + 0.1 * drift, x, y, advantages


def plain(v, coeffs, v_old, x, y):
    """log r and KL [K, B] from log-densities, as the formula says."""
    a, b, s = (c.reshape(-1, 1, 1, 1, 1) for c in (coeffs.a, coeffs.b, coeffs.s))
    new, old = a * x + b * v, a * x + b * v_old
    log_ratio = ((y - old) ** 2 - (y - new) ** 2) / (2 * s**2)
    return log_ratio.mean((2, 3, 4)), ((new - old) ** 2 / (2 * s**2)).mean((2, 3, 4))


def dppo(log_r, kl, a):
    keep = torch.ones_like(log_r)
    for k in range(STEPS):
        for i in range(BATCH):
            r = math.exp(log_r[k, i].item())
            away = (r > 1 and a[i] > 0) or (r < 1 and a[i] < 0)
            keep[k, i] = 0.0 if kl[k, i] >= 5e-4 and away else 1.0
    assert 0 < keep.sum() < keep.numel()
    return (-a * log_r.exp() * keep).mean()


def cispo(log_r, kl, a):
    return (-log_r.exp().clamp(0.997, 1.002).detach() * a * log_r).mean()


def sapo(log_r, kl, a):
    tau = torch.where(a > 0, 10.0, 20.0).double()
    return (-a * torch.sigmoid(tau * (log_r.exp() - 1)) * 4 / tau).mean()


def gspo(log_r, kl, a):
    r = log_r.mean(0).exp()
    return -torch.minimum(r * a, r.clamp(0.998, 1.002) * a).mean()


def dual(log_r, kl, a):
    r = log_r.exp()
    clipped = torch.minimum(r * a, r.clamp(0.998, 1.002) * a)
    return -torch.where(a < 0, torch.maximum(clipped, 1.001 * a), clipped).mean()


CASES = {
    "flow_dppo": (dppo, {"threshold": 5e-4}),
    "cispo": (cispo, {"low": 0.003, "high": 0.002}),
    "sapo": (sapo, {"positive": 10.0, "negative": 20.0}),
    "gspo": (gspo, {"clip": 0.002}),
    "dual_clip": (dual, {"clip": 0.002, "bound": 1.001}),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name):
    coeffs, v_old, v, x, y, advantages = problem()
    formula, settings = CASES[name]
    results = []
    for ours in (False, True):
        leaf = v.clone().requires_grad_()
        if ours:
            t = go.log_ratio(leaf, coeffs=coeffs, sample=x, prev_sample=y, old_model_output=v_old)
            loss = getattr(objectives, name)(t, advantages, **settings)
        else:
            loss = formula(*plain(leaf, coeffs, v_old, x, y), advantages)
        results.append((loss, torch.autograd.grad(loss, leaf)[0]))
    (expected, grad), (loss, ours_grad) = results
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    assert (grad - ours_grad).norm() <= 1e-9 * grad.norm()
    assert grad.norm() > 0


@pytest.mark.parametrize("name", CASES)
def test_on_policy_gradient_is_the_policy_gradient(name):
    """At ratio 1 every one of them is -A grad log p, averaged."""
    coeffs, v_old, _, x, y, advantages = problem()
    grads = []
    for objective in (getattr(objectives, name), lambda t, a: (-a * t.log_ratio).mean()):
        leaf = v_old.clone().requires_grad_()
        t = go.log_ratio(leaf, coeffs=coeffs, sample=x, prev_sample=y, old_model_output=v_old)
        assert not t.log_ratio.any()
        grads.append(torch.autograd.grad(objective(t, advantages), leaf)[0])
    torch.testing.assert_close(*grads)


def test_the_example_runs(capsys):
    objectives.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:10].strip() for line in lines[1:]] == list(objectives.OBJECTIVES)
    gradients = [line[22:32].strip() for line in lines[1:]]
    assert len(set(gradients)) == len(gradients)  # it is to show how they differ
