"""GRPO for flow models: the whole algorithm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import guard_ops as go
from guard_ops.objective import Metrics
from guard_ops.ops import next_sample

from . import batches, draws
from .batches import Minibatch, padded
from .config import TrainConfig
from .decoupled import decoupled_advantages
from .engine import Engine
from .judging import Judge, Judging, RewardError
from .learner import Learner
from .metrics import Sums
from .policy import Condition, FlowPolicy, Reward, Scores, take
from .window import Noise, Plan


class Draw(NamedTuple):
    """What an iteration draws for a rank's n samples."""

    prompts: list[int]  # [n]
    groups: Tensor  # [n], the same numbers on the device
    seeds: Tensor  # [N + 1, n, 2] of each step's noise; the last are the initial latents'
    plan: Plan  # which steps have noise, and which are trained: K of them
    condition: Condition


class Rollout(NamedTuple):
    """n trajectories of N steps, whose noise is regenerated from the seeds instead of stored."""

    latents: Tensor  # [N + 1, n, *latent]; the last is the sample
    velocities: Tensor  # [N, n, *latent] of the behaviour policy
    reference: Tensor | None  # [K, n, *latent] of the policy before training, for the KL term
    draw: Draw


class Loop:
    """Draw, roll out, judge, compare, update."""

    def __init__(
        self,
        policy: FlowPolicy,
        reward: Reward,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        guard: go.GuardConfig,
        config: TrainConfig,
        engine: Engine,
        learner: Learner,
    ) -> None:
        self.policy, self.prompts, self.metadata = policy, prompts, metadata
        self.judge = Judge(
            reward,
            retries=config.reward_retries,
            timeout=config.reward_timeout,
            overlap=config.reward_overlap,
            nonfinite=guard.nonfinite == "drop",
        )
        self.guard, self.config, self.engine, self.learner = guard, config, engine, learner
        sigmas, timesteps = policy.schedule(config.steps)
        self.timesteps = timesteps.to(engine.device)
        self.noise = Noise(sigmas, config.noise_level, config.sde, engine.device)
        self.noise.plan([config.window.steps(config.steps)], "sde")  # refuses steps without noise
        self.shares = draws.shares(config.samples, config.minibatches, engine.ranks)
        self.share = self.shares[engine.rank]
        dtype = getattr(policy, "latent_dtype", torch.float32)
        self.latent = tuple(policy.latent_shape), dtype, draws.only_noise(engine.device)
        self.chunk = batches.chunk_size(self.shares, config)
        self.most = max(len(share) for share in self.shares)
        self.report: Callable[[str, int, int], object] = lambda phase, done, total: None
        self.norms = torch.zeros(0)  # of the gradients of an iteration's updates
        self.ratios: dict[str, Tensor] = {}  # each [K, b], of this rank's last update

    def iterate(self) -> dict[str, Tensor]:
        """One iteration: its numbers over all ranks.

        Raises:
            RewardError: on every rank, if a rank's reward gives no usable answer; nothing is
                changed then.
        """
        c, device, iteration = self.config, self.engine.device, self.learner.iteration
        draw = self.draw(iteration)
        updates = batches.minibatches(self.shares, self.engine.rank, c, iteration, device)
        judging = Judging(self.judge)
        rollout = self.rollout(draw, judging)
        scores = self.scores(judging)
        advantages = self.advantages(scores, draw.groups)
        sums, norms = Sums(scores), []
        for number, minibatch in enumerate(updates):
            self.report("update", number, len(updates))
            result = self.update(rollout, advantages, minibatch, on_policy=number == 0)
            norms.append(result[2])
            if number >= len(updates) - c.minibatches:  # of the last epoch
                sums.add(*result)
        self.norms = torch.stack(norms)
        return sums.over(self.engine)

    def draw(self, iteration: int) -> Draw:
        """This rank's part of what is drawn for all ranks together."""
        c, device, share = self.config, self.engine.device, self.share
        numbers = (c.seed, iteration)
        chosen = draws.groups(len(self.prompts), c.prompts_per_iteration, c.group_size, *numbers)
        mine = chosen[share.first : share.last]
        texts, row = mine.unique(return_inverse=True)
        encoded = self.policy.encode([self.prompts[p] for p in texts.tolist()])
        condition = take({name: x.to(device) for name, x in encoded.items()}, row.to(device))
        steps = c.window.draw(c.steps, c.samples, *numbers)
        plan = self.noise.plan(
            steps if len(steps) == 1 else steps[share.first : share.last], c.window.outside
        )
        first = draws.leaders(chosen) if c.window.branch else None
        prefix = min(step for row in steps for step in row)
        seeds = draws.seeds(c.steps, c.samples, share, *numbers, device, first, prefix)
        return Draw(mine.tolist(), mine.to(device), seeds, plan, condition)

    @torch.no_grad()
    def rollout(self, draw: Draw, judging: Judging | None = None) -> Rollout:
        """Sample with the policy as it is now, ``self.chunk`` samples at a time, and have them
        judged.
        """
        n, whole = len(draw.prompts), None
        for rows in padded(n, self.chunk, self.most, self.engine.device):
            self.report("rollout", 0 if whole is None else whole.filled, n)
            condition, seeds = take(draw.condition, rows), draw.seeds[:, rows]
            latents, velocities = [draws.normals(seeds[-1], *self.latent)], []
            for k, coeffs in enumerate(draw.plan.rollout):
                timestep = self.timesteps[k].expand(self.chunk)
                velocities.append(self.policy.velocity(latents[k], timestep, condition))
                latents.append(next_sample(velocities[k], latents[k], coeffs, seed=seeds[k]))
            first = 0 if whole is None else whole.filled
            whole = batches.append(whole, n, latents, velocities)
            if judging is not None and whole.filled > first:
                self._submit(judging, draw.prompts[first : whole.filled], latents[-1])
        assert whole is not None
        rollout = Rollout(whole.latents, whole.velocities, None, draw)
        if self.guard.kl_beta:
            rows = torch.arange(n, device=self.engine.device)
            with self.policy.reference():
                reference = self.velocities(rollout, Minibatch(rows, self.most))
            rollout = rollout._replace(reference=reference)
        return rollout

    def _submit(self, judging: Judging, prompts: list[int], samples: Tensor) -> None:
        """Have the first samples of a chunk judged, which are of these prompts."""
        pixels = self.policy.decode(samples[: len(prompts)])
        judging.add(pixels, [self.prompts[p] for p in prompts], [self.metadata[p] for p in prompts])

    def scores(self, judging: Judging) -> Scores:
        """What the reward says of each sample, [n]; a rank's fault is one on all of them."""
        self.report("reward", 0, 1)
        scores = judging.scores()
        faults = self.engine.gather(None if judging.fault is None else str(judging.fault))
        for rank, fault in enumerate(faults):
            if fault is not None:
                raise RewardError(f"rank {rank}: {fault}" if self.engine.ranks > 1 else fault)
        assert scores is not None
        device = self.engine.device
        return Scores(scores.total.to(device), {n: x.to(device) for n, x in scores.parts.items()})

    def advantages(self, scores: Scores, groups: Tensor) -> Tensor:
        """Of each sample, [n]: of its reward, or of each of its parts before their sum."""
        group, scale = self.engine.group, self.config.advantage_scale
        weights = getattr(self.judge.reward, "advantage_weights", None)
        if weights is None:
            return go.group_advantages(scores.total, groups, scale=scale, process_group=group)
        return decoupled_advantages(scores.parts, weights, groups, scale=scale, process_group=group)

    def update(
        self, rollout: Rollout, advantages: Tensor, batch: Minibatch, *, on_policy: bool
    ) -> tuple[Tensor, Tensor, Tensor, Metrics]:
        """One optimizer step on a minibatch's trajectories, all their trained steps at once.

        First the velocities without a graph; they are the rollout's if no update came between, so
        that the ratio is exactly 1. Then the objective, which sees the network only through them.
        Then the backward, ``micro_batch`` transitions at a time, of which nothing depends on the
        others.

        Returns:
            The rank's share of the loss's mean, its loss, the gradient's norm, its metrics.
        """
        self.learner.ema.refuse_if_applied()
        out = self.objective(rollout, advantages, batch, on_policy=on_policy)
        assert isinstance(out.grad, Tensor)
        self.ratios = {"log_ratio": out.log_ratio.detach(), "excess": out.excess.detach()}
        weight = self.engine.weight(len(batch.rows), out, self.guard)  # the mean is over samples
        self.learner.optimizer.zero_grad(set_to_none=True)
        self._push(rollout, batch, out.grad, weight)
        norm = self.engine.clip(self.learner.parameters.values(), self.config.max_grad_norm)
        self.learner.optimizer.step()
        self.learner.ema.update()
        return weight, out.loss, norm, out.metrics

    def objective(
        self, rollout: Rollout, advantages: Tensor, batch: Minibatch, *, on_policy: bool
    ) -> go.LossAndGrad:
        """The loss over [K, b] of all ranks, and its gradient with respect to the velocities."""
        plan, rows = rollout.draw.plan, batch.rows
        steps = plan.of(rows)
        old = rollout.velocities[steps, rows]  # [K, b, *latent]
        return go.guard_loss_and_grad(
            old if on_policy else self.velocities(rollout, batch),
            advantages=advantages[rows],
            coeffs=plan.coefficients(rows),
            config=self.guard,
            old_model_output=old,
            seed=rollout.draw.seeds[steps, rows],
            ref_model_output=None if rollout.reference is None else rollout.reference[:, rows],
            process_group=self.engine.group,
        )

    @torch.no_grad()
    def velocities(self, rollout: Rollout, batch: Minibatch) -> Tensor:
        """[K, b, *latent] of the policy as it is now, by calls of the rollout's shape.

        Another shape rounds otherwise: in bfloat16 by more than a small update moves the ratio.
        """
        result = []
        for step in rollout.draw.plan.of(batch.rows):
            steps = step.expand(len(batch.rows))
            rows = padded(len(batch.rows), self.chunk, batch.most, self.engine.device)
            inputs = (self._at(rollout, steps[r], batch.rows[r]) for r in rows)
            parts = [self.policy.velocity(*each) for each in inputs]
            result.append(torch.cat(parts)[: len(batch.rows)])
        return torch.stack(result)

    def _push(self, rollout: Rollout, batch: Minibatch, gradient: Tensor, weight: Tensor) -> None:
        """Backward of ``weight`` times ``gradient`` [K, b, *latent] through the network."""
        rows, gradient = batch.rows, gradient.flatten(0, 1)  # [K b, *latent]
        steps = rollout.draw.plan.of(rows).expand(-1, len(rows)).flatten()
        most = len(gradient) // len(rows) * batch.most
        size = min(self.config.micro_batch or most, most)
        pieces = padded(len(gradient), size, most, self.engine.device)
        for number, pairs in enumerate(pieces):
            last = number == len(pieces) - 1
            at = self._at(rollout, steps[pairs], rows[pairs % len(rows)])
            velocity = self.engine.velocity(*at, last=last)
            part = _times(gradient[pairs], weight)
            part[max(0, len(gradient) - number * size) :].zero_()  # what fills the piece up
            self.engine.backward(velocity, part, last=last)

    def _at(
        self, rollout: Rollout, steps: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What the network is given for samples ``rows``, each at its step."""
        condition = take(rollout.draw.condition, rows)
        return rollout.latents[steps, rows], self.timesteps[steps], condition


def _times(gradient: Tensor, weight: Tensor) -> Tensor:
    """``weight * gradient``, rounded once: in 16 bits the weight would be off by up to 0.4%."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return (gradient.to(wide) * weight.to(wide)).to(gradient.dtype)
