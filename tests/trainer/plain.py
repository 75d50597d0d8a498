"""One GRPO-Guard update in plain PyTorch that holds the whole graph: what the trainer must equal.

It has the formulas of docs/math.md and none of the package's code but its numbers for a schedule.
"""

from __future__ import annotations

import torch
from torch import Tensor


def loss(
    new: Tensor,  # [K, B, *latent], with a graph
    old: Tensor,  # [K, B, *latent]
    sample: Tensor,  # [K, B, *latent] x
    prev_sample: Tensor,  # [K, B, *latent] y
    advantages: Tensor,  # [B]
    coeffs,  # a, b, s, dt of [K] or [K, B]
    config,
    reference: Tensor | None,
) -> Tensor:
    """The objective over everything at once."""
    # In float64, whatever the network's dtype: what two log-probs lose is not the trainer's.
    v, v_old, x, y = (x.flatten(2).double() for x in (new, old, sample, prev_sample))
    a, b, s, dt = (
        c.to(v.dtype).reshape(c.shape[0], -1, 1) for c in (coeffs.a, coeffs.b, coeffs.s, coeffs.dt)
    )
    kappa = 1 / (2 * s**2)
    log_p = -kappa * (y - (a * x + b * v)) ** 2
    log_p_old = -kappa * (y - (a * x + b * v_old)) ** 2
    log_r = (log_p - log_p_old).mean(-1)
    kl_old = (kappa * (b * (v - v_old)) ** 2).mean(-1)
    if config.ratio_norm == "standardize":
        u = torch.expm1(log_r)
        mean, std = u.detach().mean(1, keepdim=True), u.detach().std(1, correction=0, keepdim=True)
        below = std <= (1e-8 if config.std_floor == "auto" else config.std_floor)
        excess = (u - mean) * config.target_std / torch.where(below, config.target_std, std)
    elif config.ratio_norm == "closed_form":
        excess = torch.expm1(s[..., 0] * (log_r + kl_old))
    else:
        excess = torch.expm1(log_r)
    adv = advantages.clamp(-config.adv_clip, config.adv_clip)
    clipped = excess.clamp(-config.clip_low, config.clip_high)
    terms = torch.maximum(-adv * (1 + excess), -adv * (1 + clipped))
    steps = len(v)
    if config.balance == "inverse_ratio":
        rho = (1 + excess).detach().clamp(min=config.weight_floor)
        weights = (1 / rho) / (1 / rho).sum(0)
    elif config.balance == "inverse_dt":
        weights = 1 / (steps * dt[..., 0].abs())
    else:
        weights = torch.tensor(1 / steps)
    total = (weights * terms).sum(0).mean()
    if reference is not None:
        kl = ((b * (v - reference.flatten(2))) ** 2 / (2 * s**2)).mean(-1)
        total = total + config.kl_beta * kl.mean()
    assert total.isfinite()
    return total


def gradients(loop, rollout, advantages, batch, config, velocity=None) -> dict[str, Tensor]:
    """Of the update of a minibatch, all of whose activations are held at once."""
    plan, rows = rollout.draw.plan, batch.rows
    steps = plan.of(rows).expand(-1, len(rows))
    parameters = loop.learner.parameters
    call = velocity or loop.policy.velocity
    new = [call(*loop._at(rollout, step, rows)) for step in steps]
    value = loss(
        torch.stack(new),
        rollout.velocities[steps, rows],
        rollout.latents[steps, rows],
        rollout.latents[steps + 1, rows],
        advantages[rows],
        plan.coefficients(rows),
        config,
        None if rollout.reference is None else rollout.reference[:, rows],
    )
    found = torch.autograd.grad(value, list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The distance of all gradients, by their norm."""
    a, b = (torch.cat([x.flatten().double() for x in g.values()]) for g in (found, expected))
    return float((a - b).norm() / b.norm())


def cosine(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    a, b = (torch.cat([x.flatten().double() for x in g.values()]) for g in (found, expected))
    return float(a @ b / (a.norm() * b.norm()))
