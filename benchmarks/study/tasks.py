"""The two tasks: a policy to begin with, a proxy that is trained on, and gold that never is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

import guard_ops as go
from guard_ops.digits.judges import Gold, ProxyReward
from guard_ops.digits.policy import DigitPolicy, load_digits
from guard_ops.digits.pretraining import load_or_pretrain
from guard_ops.monitor.distances import frechet, moments
from guard_ops.trainer.extras import require
from guard_ops.trainer.folder import write_whole

from .words import WORDS, WordGold, WordPolicy, WordProxy, draw_words, pretrain_words


class Judged(NamedTuple):
    """An evaluation; B samples, the same prompts and noise each time."""

    proxy: Tensor  # [B]
    gold: Tensor  # [B] in [0, 1]
    diversity: float  # mean distance of two samples of a prompt, pixels in [-1, 1]
    frechet: float  # to real pictures


class DigitsTask:
    """Handwritten digits: a classifier that sees the upper half, judged by one that sees all."""

    prompts = tuple(map(str, range(10)))
    per_prompt = 60  # samples of an evaluation
    pretrain_steps = 3000
    training = {  # noqa: RUF012
        "iterations": 100, "prompts_per_iteration": 10, "group_size": 16,
        "learning_rate": 4e-4, "evaluate_every": 10,
    }  # fmt: skip
    clips = {"plain": 1e-3, "paper": 1e-4}  # noqa: RUF012  # where they are of raw ratios

    def __init__(self) -> None:
        digits = load_digits()
        self.reward, self._gold = ProxyReward(digits), Gold(digits)

    def policy(self, folder: Path, seed: int) -> DigitPolicy:
        path = folder / f"digits-{seed}" / "pretrained.safetensors"
        return load_or_pretrain(path, seed, self.pretrain_steps)

    def judge(self, samples: Tensor, labels: Tensor) -> Judged:
        probability = self._gold.probability(samples, labels)
        found = self._gold(samples, labels, probability)
        proxy = self.reward(samples, labels)
        return Judged(proxy, probability, found["diversity"], found["frechet"])


class TextTask:
    """Words in a real font: a classifier fitted on three pictures of each, judged by PP-OCR."""

    prompts = WORDS
    per_prompt = 10
    pretrain_steps = 2500
    training = {  # noqa: RUF012
        "iterations": 40, "prompts_per_iteration": 8, "group_size": 12,
        "learning_rate": 3e-4, "evaluate_every": 8,
    }  # fmt: skip
    clips = {"plain": 3e-4, "paper": 3e-5}  # noqa: RUF012

    def __init__(self) -> None:
        self.reward, self._gold = WordProxy(), WordGold()
        real = draw_words(50, 777).images.flatten(1)
        # of 432 pixels with 200 samples, random directions: their covariance has full rank
        dice = torch.Generator().manual_seed(99)
        self._directions = torch.randn(real.shape[1], 64, generator=dice) / real.shape[1] ** 0.5
        self._real = moments(real @ self._directions)

    def policy(self, folder: Path, seed: int) -> WordPolicy:
        tensors = require("safetensors.torch", "study")
        path = folder / f"text-{seed}-{self.pretrain_steps}.safetensors"
        if not path.exists():
            made = pretrain_words(seed, self.pretrain_steps)
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, tensors.save(made.state_dict()))
        policy = WordPolicy()
        policy.load_state_dict(tensors.load_file(path))
        return policy

    def judge(self, samples: Tensor, labels: Tensor) -> Judged:
        x = samples.flatten(1).clamp(-1, 1)
        within = [F.pdist(x[labels == n]).mean() for n in range(len(WORDS))]
        distance = frechet(moments(x @ self._directions), self._real)
        proxy, gold = self.reward(samples, labels), self._gold(samples, labels)
        return Judged(proxy, gold, float(torch.stack(within).mean()), distance)


Task: TypeAlias = DigitsTask | TextTask
TASKS: dict[str, type[Task]] = {"digits": DigitsTask, "text": TextTask}


@torch.no_grad()
def sample(policy: Any, schedule: go.SdeSchedule, labels: Tensor, seed: int) -> Tensor:
    """[B, *latent] by the sampler that training uses."""
    dice = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(labels), *policy.latent_shape, generator=dice)
    for k, coeffs in enumerate(schedule):
        sigma = torch.full((len(labels),), schedule.sigmas[k])
        velocity = policy.velocity(latents, sigma, {"label": labels})
        latents = go.sde_step(velocity, latents, coeffs, generator=dice).prev_sample
    return latents
