"""A policy small enough to train in milliseconds."""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import guard_ops as go
from guard_ops.trainer import TrainConfig, Trainer

SCHEDULE = go.SdeSchedule([1.0, 0.8, 0.5, 0.2, 0.0])
CONFIG = TrainConfig(
    iterations=6,
    prompts_per_iteration=2,
    group_size=8,
    learning_rate=1e-2,
    checkpoint_every=2,
    tensorboard=False,
)


class TinyPolicy(nn.Module):
    """A frozen base and a trained correction, like a LoRA."""

    latent_shape = (2, 3)

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.base, self.correction = nn.Linear(6, 6), nn.Linear(7, 6)
        self.prompt = nn.Embedding(3, 6)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        self.base.requires_grad_(False)

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        x = latents.flatten(1)
        trained = self.correction(torch.cat([x, sigma[:, None]], 1)) + self.prompt(condition)
        return (self.base(x) + trained).reshape(latents.shape)


def reward(samples: Tensor, condition: Tensor) -> Tensor:
    return samples.flatten(1).mean(1)


def tiny_trainer(out: Path, *, resume: bool = False, **changes: Any) -> Trainer:
    keys = ("policy", "reward", "guard", "optimizer", "evaluate", "prompts", "initialize", "recipe")
    parts = {key: changes.pop(key) for key in keys if key in changes}
    return Trainer(
        parts.get("policy") or TinyPolicy(),
        parts.get("reward", reward),
        parts.get("prompts", torch.arange(3)),
        SCHEDULE,
        parts.get("guard", go.GuardConfig.article()),
        dataclasses.replace(CONFIG, **changes),
        out,
        resume=resume,
        optimizer=parts.get("optimizer"),
        evaluate=parts.get("evaluate"),
        initialize=parts.get("initialize"),
        recipe=parts.get("recipe"),
    )


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process grows beyond ``size`` bytes, as where a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
