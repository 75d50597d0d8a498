"""A policy small enough to train in milliseconds."""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import guard_ops as go
from guard_ops.trainer import (
    Condition,
    Loop,
    Rollout,
    Schedule,
    TrainConfig,
    Trainer,
    batches,
)

SIGMAS = (1.0, 0.8, 0.5, 0.2, 0.0)
PROMPTS = ["0", "1", "2"]
CONFIG = TrainConfig(
    iterations=6,
    prompts_per_iteration=2,
    group_size=8,
    steps=4,
    learning_rate=1e-2,
    checkpoint_every=2,
    tensorboard=False,
)


class TinyPolicy(nn.Module):
    """A frozen base and a trained correction, like a LoRA; a prompt is a number."""

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

        self.corrected = True

    def schedule(self, steps: int) -> Schedule:
        assert steps == len(SIGMAS) - 1
        return Schedule(SIGMAS, 1000 * torch.tensor(SIGMAS[:-1]))

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"number": torch.tensor([int(prompt) for prompt in prompts])}

    def velocity(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        x = latents.flatten(1).to(self.base.weight.dtype)
        out = self.base(x)
        if self.corrected:
            sigma = (timestep[:, None] / 1000).to(x.dtype)
            out = out + self.correction(torch.cat([x, sigma], 1)) + self.prompt(condition["number"])
        return out.reshape(latents.shape)

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, None]  # not in [0, 1], so that there is something to gain

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.corrected = False
        try:
            yield
        finally:
            self.corrected = True


class Double(TinyPolicy):
    latent_dtype = torch.float64

    def __init__(self) -> None:
        super().__init__()
        self.double()


def reward(pixels: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    return pixels.flatten(1).mean(1)


def tiny_trainer(out: Path, *, resume: bool = False, **changes: Any) -> Trainer:
    keys = (
        "policy", "reward", "guard", "optimizer", "evaluate", "prompts", "initialize", "recipe",
        "metadata", "engine",
    )  # fmt: skip
    parts = {key: changes.pop(key) for key in keys if key in changes}
    return Trainer(
        parts.get("policy") or TinyPolicy(),
        parts.get("reward", reward),
        parts.get("prompts", PROMPTS),
        parts.get("guard", go.GuardConfig.article()),
        dataclasses.replace(CONFIG, **changes),
        out,
        resume=resume,
        optimizer=parts.get("optimizer"),
        evaluate=parts.get("evaluate"),
        initialize=parts.get("initialize"),
        recipe=parts.get("recipe"),
        metadata=parts.get("metadata"),
        engine=parts.get("engine"),
    )


def started(trainer: Trainer) -> tuple[Loop, Rollout, list[batches.Minibatch]]:
    """Its loop, the first rollout, and the minibatches of the first iteration."""
    loop = trainer.loop
    found = batches.minibatches(
        loop.shares, trainer.engine.rank, trainer.config, 0, torch.device("cpu")
    )
    return loop, loop.rollout(loop.draw(0)), found


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process grows beyond ``size`` bytes, as where a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
