"""GRPO-Guard without a trainer: one complete loop on a toy flow, 20 seconds of one core.

    python examples/minimal_grpo.py

The flow makes points on a ring and ignores its prompt, which asks for one of four places there.
Training rewards points that lie where the prompt asks. docs/writing-a-loop.md says what each choice
is for, and what changes with a model of yours; minimal_grpo.ipynb is the same with pictures.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import guard_ops as go

PROMPTS, GROUP, STEPS = 4, 32, 10
PLACES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])  # what each prompt asks


class Flow(nn.Module):
    """The velocity ``noise - data`` at x, by which ``x = (1 - sigma) data + sigma noise`` moves."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(2 + 1 + PROMPTS, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(),
                  nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2)]  # fmt: skip
        self.net = nn.Sequential(*layers)

    def forward(
        self,
        x: Tensor,  # [B, 2]
        sigma: Tensor,  # [B, 1]
        prompt: Tensor,  # [B] int64
    ) -> Tensor:
        return self.net(torch.cat([x, sigma, nn.functional.one_hot(prompt, PROMPTS)], 1))


def pretrain(flow: Flow, updates: int = 800) -> None:
    """Flow matching on a ring of radius 1, whatever the prompt."""
    optimizer = torch.optim.AdamW(flow.parameters(), lr=2e-3)
    for _ in range(updates):
        angle, sigma = 2 * torch.pi * torch.rand(512), torch.rand(512, 1)
        data = torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(512, 2)
        noise = torch.randn(512, 2)
        v = flow((1 - sigma) * data + sigma * noise, sigma, torch.randint(PROMPTS, (512,)))
        optimizer.zero_grad()
        (v - (noise - data)).square().mean().backward()
        optimizer.step()


def reward_of(samples: Tensor, prompt: Tensor) -> Tensor:
    """[B]: 1 at the place that was asked for, less by the square of the distance from it."""
    return 1 - (samples - PLACES[prompt]).square().sum(1)


class Progress(NamedTuple):
    """What one iteration of :func:`train` was."""

    reward: float  # mean over the samples
    grad_norms: list[float]  # of each update, before it is clipped
    metrics: go.Metrics  # of the last update


def train(
    flow: Flow, iterations: int = 80, learning_rate: float = 1e-3, max_grad_norm: float = 0.05
) -> list[Progress]:
    """GRPO-Guard, whole."""
    schedule = go.SdeSchedule(torch.linspace(1, 0, STEPS + 1), noise_level=0.7)  # sigma: 1 to 0
    K = STEPS - 1  # trained steps: all but the last, whose noise no later step removes
    config = go.GuardConfig.article()  # RatioNorm by standardizing, clip 0.2, balanced steps
    optimizer = torch.optim.AdamW(flow.parameters(), lr=learning_rate, weight_decay=0.0)
    prompt = torch.arange(PROMPTS).repeat_interleave(GROUP)  # [B], a group of samples for each

    def velocity(k: int, x: Tensor) -> Tensor:
        return flow(x, torch.full((len(x), 1), schedule.sigmas[k]), prompt)

    history = []
    for iteration in range(iterations):
        x, v_old = [torch.randn(len(prompt), 2)], []
        with torch.no_grad():  # the rollout: keep the latents and the velocities
            for k in range(STEPS):
                v_old.append(velocity(k, x[k]))
                x.append(go.sde_step(v_old[k], x[k], schedule[k]).prev_sample)
        rewards = reward_of(x[STEPS], prompt)
        advantages = go.group_advantages(rewards, prompt)  # each against its own prompt's samples

        grad_norms = []
        for _ in range(2):  # updates; the first is on policy, its ratio is exactly 1
            out = go.guard_loss(
                torch.stack([velocity(k, x[k]) for k in range(K)]),  # [K, B, 2]
                advantages=advantages,
                coeffs=schedule[:K],
                config=config,
                sample=torch.stack(x[:K]),
                prev_sample=torch.stack(x[1 : K + 1]),
                old_model_output=torch.stack(v_old[:K]),
            )
            optimizer.zero_grad()
            out.loss.backward()
            # The second update divides by the ratio's spread, some 0.01, and its gradient is that
            # much larger. A bound below that of both gives each of them the same length.
            norm = nn.utils.clip_grad_norm_(flow.parameters(), max_grad_norm)
            optimizer.step()
            grad_norms.append(norm.item())
        history.append(Progress(rewards.mean().item(), grad_norms, out.metrics))
        if iteration % 10 == 0 or iteration == iterations - 1:
            clipped = out.metrics.clip_fraction.mean()
            print(f"iteration {iteration:3d}  reward {rewards.mean():6.3f}  clipped {clipped:4.0%}")
    return history


def main() -> None:
    torch.manual_seed(0)
    flow = Flow()
    pretrain(flow)
    train(flow)


if __name__ == "__main__":
    main()
