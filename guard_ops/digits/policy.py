"""A real job that fits in a minute: a class-conditional flow on 1,797 handwritten 8x8 digits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import guard_ops as go

from ..trainer.extras import require
from ..trainer.policy import Condition, FlowPolicy, Schedule

CLASSES = 10
SHAPE = (1, 8, 8)
PROXY_IMAGES, GOLD_IMAGES = 200, 1500  # the other 97 measure both classifiers


class Digits(NamedTuple):
    """scikit-learn's digits in a fixed random order."""

    images: Tensor  # [1797, 1, 8, 8] float32 in [-1, 1]
    labels: Tensor  # [1797] int64


def load_digits() -> Digits:
    """The images that ship with scikit-learn; no network."""
    raw = require("sklearn.datasets", "demo").load_digits()
    order = torch.randperm(len(raw.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(raw.images).float().reshape(-1, *SHAPE) / 8 - 1
    return Digits(images[order], torch.from_numpy(raw.target).long()[order])


def sigmas(steps: int, shift: float = 3.0) -> list[float]:
    """``steps + 1`` noise levels from 1 to 0, uniform but for the shift of SD3 and FLUX."""
    times = [1 - k / steps for k in range(steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in times]


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        out: Tensor = h + self.down(F.silu(self.up(self.norm(h) + condition)))
        return out


class DigitPolicy(nn.Module):
    """A residual MLP of 0.6 M parameters; a :class:`~guard_ops.trainer.FlowPolicy`."""

    latent_shape = SHAPE

    def __init__(self, width: int = 256, blocks: int = 4) -> None:
        super().__init__()
        pixels = math.prod(SHAPE)
        self.image, self.time = nn.Linear(pixels, width), nn.Linear(32, width)
        self.label = nn.Embedding(CLASSES, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, pixels)
        nn.init.zeros_(self.out.weight)
        self.frequencies: Tensor
        self.register_buffer("frequencies", 2.0 ** torch.linspace(0, 8, 16), persistent=False)

    def velocity(
        self,
        latents: Tensor,  # [B, 1, 8, 8]
        timestep: Tensor,  # [B], which is sigma
        condition: Condition,  # "label": [B] int64
    ) -> Tensor:
        angles = timestep[:, None] * self.frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        context = F.silu(time + self.label(condition["label"]))
        h = self.image(latents.flatten(1)) + context
        for block in self.blocks:
            h = block(h, context)
        out: Tensor = self.out(self.norm(h))
        return out.reshape(latents.shape)

    def schedule(self, steps: int) -> Schedule:
        levels = sigmas(steps)
        return Schedule(tuple(levels), torch.tensor(levels[:-1]))

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """A prompt is a digit."""
        return {"label": torch.tensor([int(prompt) for prompt in prompts])}

    def decode(self, latents: Tensor) -> Tensor:
        """[B, 3, 8, 8], grey."""
        return ((latents + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)

    def reference(self) -> AbstractContextManager[None]:
        raise NotImplementedError("the digits policy keeps no reference; `kl_beta` needs to be 0")


def flow_matching_loss(
    policy: DigitPolicy, digits: Digits, batch: int, generator: torch.Generator
) -> Tensor:
    """``|v(x_sigma) - (noise - image)|^2`` on ``batch`` random digits, sigma uniform."""
    rows = torch.randint(len(digits.labels), (batch,), generator=generator)
    images = digits.images[rows]
    sigma = torch.rand(batch, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    level = sigma.reshape(-1, 1, 1, 1)
    condition = {"label": digits.labels[rows]}
    velocity = policy.velocity((1 - level) * images + level * noise, sigma, condition)
    return F.mse_loss(velocity, noise - images)


@torch.no_grad()
def sample(
    policy: FlowPolicy, schedule: go.SdeSchedule, per_class: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Samples [10 * per_class, 1, 8, 8] and their classes, by the sampler that training uses."""
    generator = torch.Generator().manual_seed(seed)
    condition = torch.arange(CLASSES).repeat_interleave(per_class)
    latents = torch.randn(len(condition), *SHAPE, generator=generator)
    for k, coeffs in enumerate(schedule):
        sigma = torch.full((len(condition),), schedule.sigmas[k])
        velocity = policy.velocity(latents, sigma, {"label": condition})
        latents = go.sde_step(velocity, latents, coeffs, generator=generator).prev_sample
    return latents, condition
