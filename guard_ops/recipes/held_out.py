"""The monitor's readings of a pipeline: gold on prompts that training never draws."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import guard_ops as go

from ..monitor import Monitor
from ..monitor.distances import Features, pixels
from ..trainer.judging import Judge, Judging
from ..trainer.policy import Reward
from ..trainer.prompts import Prompts, read_prompts
from .config import Recipe
from .prompt_sets import prompt_file

if TYPE_CHECKING:
    from ..policies import PipelinePolicy
    from ..trainer.trainer import Trainer

SEED = 2**41  # of the initial noise, whatever the run's seed: always the same


def held_out_prompts(recipe: Recipe, trained: Prompts) -> Prompts:
    """``gold_prompts``, or the test prompts that lie beside those for training.

    Raises:
        ValueError: there are none, or training draws one of them.
    """
    given = recipe.gold_prompts
    file = prompt_file(given or recipe.prompts, "test")
    if not given and file == recipe.prompts:
        raise ValueError(
            f"`gold_prompts` is not given, and `prompts` {recipe.prompts!r} is a file, without "
            "test prompts; it needs a file of prompts that training does not have"
        )
    found = read_prompts(file)
    seen = set(trained.texts)
    for text in (text for text in found.texts if text in seen):
        raise ValueError(
            f"`gold_prompts` {file!r} has {text!r}, which `prompts` has too; the monitor needs "
            "prompts that training never draws"
        )
    return found


def features_of(name: str) -> Features:
    """ "pixels", or the function "module:function" of yours.

    Raises:
        ValueError: there is none.
    """
    if name == "pixels":
        return pixels
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(
            f"`gold_features` is {name!r}; it needs pixels, or a function of yours as "
            "module:function, of images [N, 3, H, W] in [0, 1]"
        )
    try:
        found: Features = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"`gold_features` is {name!r}, which cannot be imported: {error}"
        ) from error
    return found


class HeldOut:
    """Samples of the held-out prompts in turn, without noise, with the averaged weights."""

    def __init__(
        self,
        policy: PipelinePolicy,
        trainer: Trainer,
        recipe: Recipe,
        gold: Reward,
        prompts: Prompts,
        features: Features,
        out: Path,
    ) -> None:
        self.policy, self.trainer, self.recipe, self.prompts = policy, trainer, recipe, prompts
        self.gold, self.features = Judge(gold, timeout=recipe.reward_timeout), features
        self.monitor = Monitor(out, trainer.iteration)

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """A reading; sets the trainer's ``best`` and ``finished``."""
        engine, trainer = self.trainer.engine, self.trainer
        with trainer.ema.applied() if self.recipe.ema_decay else nullcontext():
            proxy, gold, features, logits = self._judged()
        names = [self.prompts.texts[n % len(self.prompts.texts)] for n in range(len(gold))]

        def read() -> tuple[dict[str, float], bool, bool]:
            numbers = self.monitor.add(trainer.iteration, proxy, gold, features, names, logits)
            verdict = self.monitor.verdict()
            if numbers["over_optimizing"]:
                print(f"iteration {trainer.iteration}: {verdict}", flush=True)
            return numbers, self.monitor.is_best, verdict.since is not None

        numbers, trainer.best, over = engine.first(read)
        trainer.finished = over and self.recipe.stop_over_optimizing
        return numbers

    def _judged(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Proxy [n], gold [n], features [n, D] and logits [n, C] of all samples, on the CPU."""
        recipe, engine, loop = self.recipe, self.trainer.engine, self.trainer.loop
        count = recipe.gold_samples
        size = min(recipe.rollout_batch or 8, -(-count // engine.ranks))
        judgings = Judging(loop.judge), Judging(self.gold)
        found: list[Tensor] = []
        mine: list[int] = []
        classifier: list[Tensor] = []
        for first in range(0, count, size * engine.ranks):
            # every rank makes as many calls, so that sharded weights are gathered together
            wanted = [first + engine.rank + engine.ranks * n for n in range(size)]
            rows = [min(row, count - 1) for row in wanted]
            images = self._sample(rows)
            kept = sum(row < count for row in wanted)
            if not kept:
                continue
            texts = [self.prompts.texts[row % len(self.prompts.texts)] for row in rows[:kept]]
            metadata = [self.prompts.metadata[r % len(self.prompts.texts)] for r in rows[:kept]]
            for judging in judgings:
                judging.add(images[:kept], texts, metadata)
            middle = images[:kept] if images.ndim == 4 else images[:kept, images.shape[1] // 2]
            each = self.features(middle)
            each, logits = each if isinstance(each, tuple) else (each, None)
            found.append(each.float())
            classifier += [] if logits is None else [logits.float()]
            mine += rows[:kept]
        proxy, gold = (loop.scores(judging).total for judging in judgings)
        parts = [proxy[:, None], gold[:, None], torch.cat(found)]
        parts += [torch.cat(classifier)] if classifier else []
        widths = [part.shape[1] for part in parts]
        own = torch.cat([part.double().to(engine.device) for part in parts], 1)
        whole = torch.zeros(count, own.shape[1], dtype=torch.float64, device=engine.device)
        whole[torch.tensor(mine, device=engine.device)] = own
        columns = engine.joined(whole).cpu().split(widths, 1)
        logits = columns[3] if classifier else None
        return columns[0][:, 0], columns[1][:, 0], columns[2].float(), logits

    def _sample(self, rows: list[int]) -> Tensor:
        """Pixels of some samples, each from its own noise."""
        device, policy = self.trainer.engine.device, self.policy
        sigmas, timesteps = policy.schedule(self.recipe.evaluation_steps)
        texts = [self.prompts.texts[row % len(self.prompts.texts)] for row in rows]
        condition = {name: x.to(device) for name, x in policy.encode(texts).items()}
        noise = [
            torch.randn(policy.latent_shape, generator=torch.Generator().manual_seed(SEED + row))
            for row in rows
        ]
        latents = torch.stack(noise).to(device)
        for k, coeffs in enumerate(go.SdeSchedule(sigmas, 0.0, device=device)):
            timestep = timesteps[k].to(device).expand(len(rows))
            velocity = policy.velocity(latents, timestep, condition)
            still = torch.zeros_like(latents)
            latents = go.sde_step(velocity, latents, coeffs, noise=still).prev_sample
        return policy.decode(latents)
