"""A scheduler, a small velocity network and a rollout, as the frameworks' scripts have them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

STEPS = 8


class Velocity(nn.Module):
    """A small convolutional network of the latent and the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(5, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 4, 3, padding=1)
        )

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        time = (timestep / 1000).reshape(-1, 1, 1, 1).expand(len(x), 1, *x.shape[2:])
        return self.inner(torch.cat([x, time], 1))


@pytest.fixture
def scheduler():
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers' schedulers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    return scheduler


@pytest.fixture
def network():
    torch.manual_seed(3)
    return Velocity()
