"""GRPO for flow models: the whole algorithm."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import guard_ops as go

from . import state
from .config import TrainConfig
from .ema import Ema
from .folder import FolderLock, RunFolderError
from .metrics import MetricsWriter
from .policy import FlowPolicy, Reward, trainable
from .progress import progress_bar


class Rollout(NamedTuple):
    """B trajectories of N steps, whose noise is regenerated from the seeds instead of stored."""

    latents: Tensor  # [N + 1, B, *latent]; the last is the sample
    velocities: Tensor  # [N, B, *latent] of the behaviour policy
    seeds: Tensor  # [N, B, 2]
    condition: Tensor  # [B, ...]


class Trainer:
    """Fine-tunes ``policy`` to raise ``reward`` with the objective ``guard``.

    Args:
        policy: a :class:`FlowPolicy`; it is trained in place.
        reward: ``(samples [B, *latent], condition [B, ...]) -> [B]``.
        prompts: [P, ...], one condition a row.
        schedule: the sampler's steps.
        guard: the objective (``go.GuardConfig.article()`` ...).
        config: everything else.
        out: folder of ``metrics.jsonl``, ``tensorboard/`` and ``checkpoints/``.
        resume: continue from the newest intact checkpoint in ``out``, if there is one.
        optimizer: over the policy's trainable parameters; default AdamW.
        evaluate: called every ``config.evaluate_every`` iterations; its numbers join that line of
            the metrics. It must draw from a generator of its own.
        initialize: called when a run begins, before its first checkpoint, to give the policy its
            first weights; those of a resumed run come from its checkpoint.
        recipe: numbers and text that a continuation must share with its run, beside what the
            trainer compares itself: where the policy or the reward came from.

    Raises:
        ValueError: ``out`` has checkpoints and ``resume`` is False, or is of a run with other
            settings; the policy has nothing to train. RunFolderError: another process trains in
            ``out``, or it cannot be written. CheckpointError: all checkpoints are damaged. What
            is refused leaves the files as they were, but ``run.lock``, which says who had the
            folder last.
    """

    ema: Ema
    settings: dict[str, Any]  # what a continuation must share

    def __init__(
        self,
        policy: FlowPolicy,
        reward: Reward,
        prompts: Tensor,
        schedule: go.SdeSchedule,
        guard: go.GuardConfig,
        config: TrainConfig,
        out: str | Path,
        *,
        resume: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
        evaluate: Callable[[], dict[str, float]] | None = None,
        initialize: Callable[[], object] | None = None,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        self.policy, self.reward, self.prompts = policy, reward, prompts
        self.guard, self.config, self.out = guard, config, Path(out)
        self.evaluate, self.recipe = evaluate, recipe or {}
        self.parameters = trainable(policy)
        if not self.parameters:
            raise ValueError(
                "`policy` has no parameter that requires grad; there is nothing to train"
            )
        if len(prompts) < config.prompts_per_iteration:
            raise ValueError(
                f"`prompts` has {len(prompts)} rows; `prompts_per_iteration` "
                f"{config.prompts_per_iteration} needs at least as many"
            )
        if len(schedule) <= config.skip_last_steps:
            raise ValueError(
                f"`schedule` has {len(schedule)} steps; `skip_last_steps` "
                f"{config.skip_last_steps} leaves none to train"
            )
        self.device = next(iter(self.parameters.values())).device
        self.schedule = schedule.to(self.device)
        self.sigmas = torch.tensor(schedule.sigmas, dtype=torch.float32, device=self.device)
        self.trained = slice(0, len(schedule) - config.skip_last_steps)
        self.optimizer = optimizer or torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.generator = torch.Generator().manual_seed(config.seed)
        self.iteration = 0
        self.checkpoints = self.out / "checkpoints"
        self.writer = MetricsWriter(self.out, tensorboard=config.tensorboard)
        self._lock = FolderLock(self.out)
        try:
            state.start(self, resume, initialize)
        except BaseException:
            with suppress(RunFolderError):  # the first failure is the one to see
                self.close()
            raise

    # --- the algorithm -----------------------------------------------------------------------

    def iterate(self) -> dict[str, Tensor]:
        """One iteration: rollout, rewards, advantages, updates. Nothing waits for the device."""
        c = self.config
        prompt = torch.randperm(len(self.prompts), generator=self.generator)
        groups = prompt[: c.prompts_per_iteration].repeat_interleave(c.group_size)
        groups = groups[torch.randperm(len(groups), generator=self.generator)].to(self.device)
        rollout = self.rollout(self.prompts[groups])
        rewards = self.reward(rollout.latents[-1], rollout.condition)
        advantages = go.group_advantages(rewards, groups, scale=c.advantage_scale)

        rows, updates = torch.arange(len(groups)), []
        for _ in range(c.inner_epochs):
            updates = [
                self.update(rollout, advantages, chunk.to(self.device))
                for chunk in rows.tensor_split(c.minibatches)
            ]
            rows = torch.randperm(len(groups), generator=self.generator)
        last_epoch = {name: torch.stack([u[name] for u in updates]).mean(0) for name in updates[0]}
        return {"reward": rewards.mean(), "reward_std": rewards.std(correction=0), **last_epoch}

    @torch.no_grad()
    def rollout(self, condition: Tensor) -> Rollout:
        """Sample with the policy as it is now, in the chunks of the first epoch's minibatches.

        The first update then makes calls of the same size on the same rows (on copies, as the
        rounding of matrix products also depends on how their operands are aligned). So its
        velocities have the bits of those recorded here, and it is exactly on policy: its ratio is
        1, not 1 plus rounding.
        """
        seed = int(torch.randint(2**63 - 1, (), generator=self.generator))
        seeds = go.philox_seed(seed, (len(self.schedule), len(condition)), self.device)
        shape = (len(condition), *self.policy.latent_shape)
        noise = torch.randn(shape, generator=self.generator).to(self.device)
        parts = []
        chunks = min(self.config.minibatches, len(condition))
        for rows in torch.arange(len(condition)).tensor_split(chunks):
            latents, velocities = [noise[rows]], []
            for k, coeffs in enumerate(self.schedule):
                velocities.append(self._velocity(k, latents[k], condition[rows]))
                step = go.sde_step(velocities[k], latents[k], coeffs, seed=seeds[k, rows])
                latents.append(step.prev_sample)
            parts.append((torch.stack(latents), torch.stack(velocities)))
        latents_all, velocities_all = (torch.cat(p, dim=1) for p in zip(*parts, strict=True))
        return Rollout(latents_all, velocities_all, seeds, condition)

    def update(self, rollout: Rollout, advantages: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """One optimizer step on the trajectories ``rows``, all their trained steps at once."""
        self.ema.refuse_if_applied()
        condition = rollout.condition[rows]
        steps = range(*self.trained.indices(len(self.schedule)))
        velocity = torch.stack(
            [self._velocity(k, rollout.latents[k, rows], condition) for k in steps]
        )
        out = go.guard_loss(
            velocity,
            advantages=advantages[rows],
            coeffs=self.schedule[self.trained],
            config=self.guard,
            old_model_output=rollout.velocities[self.trained, rows],
            seed=rollout.seeds[self.trained, rows],
        )
        self.optimizer.zero_grad(set_to_none=True)
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
        self.optimizer.step()
        self.ema.update()
        return {"loss": out.loss.detach(), "grad_norm": norm, **out.metrics._asdict()}

    def _velocity(self, k: int, latents: Tensor, condition: Tensor) -> Tensor:
        return self.policy.velocity(latents, self.sigmas[k].expand(len(latents)), condition)

    # --- around it ---------------------------------------------------------------------------

    def fit(self, progress: bool = True, title: str = "training") -> None:
        """Train until ``config.iterations``, writing metrics and checkpoints on the way.

        A run that has come so far already does nothing.

        Raises:
            FloatingPointError: the loss is not finite, which is noticed before a checkpoint.
        """
        c = self.config
        if self.iteration >= c.iterations:
            return
        bars = progress_bar(title, c.iterations, self.iteration) if progress else nullcontext()
        with bars as bar:
            while self.iteration < c.iterations:
                started = time.perf_counter()
                numbers: dict[str, Any] = {
                    name: value.tolist() for name, value in self.iterate().items()
                }
                self.iteration += 1
                if not math.isfinite(numbers["loss"]):
                    raise FloatingPointError(
                        f"the loss is {numbers['loss']} in iteration {self.iteration} "
                        f"({sum(numbers['nonfinite']):.0f} transitions are not finite); the "
                        'checkpoints are from before it. GuardConfig(nonfinite="drop") skips such '
                        "transitions"
                    )
                numbers["seconds"] = time.perf_counter() - started
                last = self.iteration == c.iterations
                if self.evaluate and (last or self.iteration % c.evaluate_every == 0):
                    numbers.update(self.evaluate())
                self.writer.write(self.iteration, numbers)
                if c.checkpoint_every and (last or self.iteration % c.checkpoint_every == 0):
                    self.save()
                if bar is not None:
                    bar(self.iteration, f"reward {numbers['reward']:.3f}")

    def save(self) -> Path:
        """Write a checkpoint of this moment; returns its folder.

        Raises:
            RunFolderError: it cannot be written, or this iteration has one already.
        """
        return state.save(self)

    def close(self) -> None:
        """Close the metrics files and leave the folder to others."""
        try:
            self.writer.close()
        finally:
            self._lock.release()
