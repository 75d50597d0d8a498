"""A scheduler, a small velocity network and a rollout, as the frameworks' scripts have them."""

from __future__ import annotations

import sys

import pytest
import restated
import torch
from torch import nn

import guard_ops.integrations as integrations

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


@pytest.fixture
def nothing_stays():
    """Takes back what a test has patched or imported of frameworks."""
    yield
    for installation in integrations._installations.values():
        installation.remove()
        installation.handles = 0
    for name in [name for name in sys.modules if name.partition(".")[0] == "fastvideo"]:
        del sys.modules[name]


@pytest.fixture
def flow_grpo_package(monkeypatch):
    """The patch module, a pipeline that imported its function by name, and that function."""
    held = [restated.flow_grpo_step()]
    package = "flow_grpo.diffusers_patch"
    defining, using = (
        restated.module(monkeypatch, f"{package}.{name}", sde_step_with_logprob=held[0])
        for name in ("sd3_sde_with_logprob", "sd3_pipeline_with_logprob")
    )
    return defining, using, held
