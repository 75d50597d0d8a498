"""Swapping guard_ops into a GRPO loop, cell by cell (# %% marks them for editors that know cells).

    python examples/swap_in.py

It has a small velocity network, a rollout, and two updates of the same weights: one written the way
trainers write it today, one with guard_ops. It prints what differs: almost nothing in the loss,
but the digits of the ratio, time and memory.
"""

# %% The pieces every trainer has: sigmas, a network, a rollout's tensors
from __future__ import annotations

import copy
import math
import time

import torch
from torch import Tensor, nn

import guard_ops as go

torch.manual_seed(0)
SIGMAS = torch.linspace(1, 0, 11)
SIGMAS = 3 * SIGMAS / (1 + 2 * SIGMAS)  # shift 3
ETA, CLIP, BATCH, LATENT, TRAINED = 0.7, 1e-4, 8, (16, 64, 64), range(1, 9)


class Velocity(nn.Module):
    """A small network in the place of the diffusion transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(17, 32, 1), nn.SiLU(), nn.Conv2d(32, 16, 1))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.net(torch.cat([x, sigma.expand(len(x), 1, *x.shape[2:])], 1))


# %% Rollout. Before: mean, noise and log-prob by hand. After: one call
def rollout(network: Velocity, schedule: go.SdeSchedule) -> dict[str, list[Tensor]]:
    """Latents, means, log-probs of every trained step (guard_ops writes all three at once)."""
    kept: dict[str, list[Tensor]] = {"x": [], "y": [], "mean": [], "log_prob": []}
    x = torch.randn(BATCH, *LATENT)
    with torch.no_grad():
        for k in TRAINED:
            v = network(x, SIGMAS[k])
            y, mean, log_prob, _ = go.sde_step(v, x, schedule[k])
            for name, value in zip(kept, (x, y, mean, log_prob), strict=True):
                kept[name].append(value)
            x = y
    return kept


# %% The loss before: log-probs of whole latents, subtracted, exponentiated, clipped
def loss_before(v: Tensor, kept: dict[str, list[Tensor]], j: int, advantages: Tensor) -> Tensor:
    """Flow-GRPO's loss, as its scripts write it."""
    sigma, following = SIGMAS[TRAINED[j]], SIGMAS[TRAINED[j] + 1]
    dt = following - sigma
    std = torch.sqrt(sigma / (1 - torch.where(sigma == 1, SIGMAS[1], sigma))) * ETA
    mean = (
        kept["x"][j] * (1 + std**2 / (2 * sigma) * dt)
        + v * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    )
    s = std * torch.sqrt(-dt)
    log_prob = (
        -((kept["y"][j] - mean) ** 2) / (2 * s**2) - torch.log(s) - 0.5 * math.log(2 * math.pi)
    )
    ratio = torch.exp(log_prob.mean((1, 2, 3)) - kept["log_prob"][j])
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return torch.maximum(-advantages * ratio, -advantages * clipped).mean()


# %% The loss after
def loss_after(
    v: Tensor, kept: dict[str, list[Tensor]], j: int, advantages: Tensor, schedule: go.SdeSchedule
) -> go.GuardLossOutput:
    """The same objective; ``config=go.GuardConfig.article()`` would make it GRPO-Guard."""
    return go.guard_loss(
        v,
        advantages=advantages,
        coeffs=schedule[TRAINED[j]],
        config=go.GuardConfig.flow_grpo(clip_low=CLIP, clip_high=CLIP),
        sample=kept["x"][j],
        prev_sample=kept["y"][j],
        old_mean=kept["mean"][j],
    )


# %% One epoch of updates, either way
def train(
    network: Velocity, kept: dict[str, list[Tensor]], advantages: Tensor, schedule: go.SdeSchedule,
    swapped: bool,
) -> tuple[Velocity, float, list[float]]:  # fmt: skip
    """The trained network, seconds spent in loss and backward to v, and the losses."""
    policy = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-4)
    seconds, losses = 0.0, []
    for j, k in enumerate(TRAINED):
        v = policy(kept["x"][j], SIGMAS[k])
        leaf = v.detach().requires_grad_()  # separates the loss from the network, to time it alone
        start = time.perf_counter()
        loss = (
            loss_after(leaf, kept, j, advantages, schedule).loss
            if swapped
            else loss_before(leaf, kept, j, advantages)
        )
        loss.backward()
        seconds += time.perf_counter() - start
        optimizer.zero_grad()
        v.backward(leaf.grad)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return policy, seconds, losses


# %% Run both, from the same rollout
def main() -> None:
    """Print what the swap changes."""
    network, schedule = Velocity(), go.SdeSchedule(SIGMAS, noise_level=ETA)
    kept = rollout(network, schedule)
    advantages = go.group_advantages(torch.randn(BATCH))
    runs = []
    for swapped in (False, True):
        train(network, kept, advantages, schedule, swapped)  # warm up
        runs.append(train(network, kept, advantages, schedule, swapped))
    (before, slow, losses), (after, fast, new_losses) = runs
    worst = max(abs(a - b) for a, b in zip(losses, new_losses, strict=True))
    weights = max(
        (p - q).abs().max().item()
        for p, q in zip(before.parameters(), after.parameters(), strict=True)
    )
    print(f"losses differ by at most {worst:.1e}, weights after an epoch by {weights:.1e}")
    print(f"loss and its gradient: {slow * 1e3:.1f} ms before, {fast * 1e3:.1f} ms after")
    v = network(kept["x"][0], SIGMAS[TRAINED[0]]).detach()
    out = loss_after(v, kept, 0, advantages, schedule)
    print(
        f"on policy the ratio is 1 + {out.excess.abs().max().item()} (before: it only rounds to 1)"
    )


if __name__ == "__main__":
    main()
