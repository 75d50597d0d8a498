"""TrainConfig: how to train; what to optimize is GuardConfig's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from guard_ops.schedule import SdeKind

from .window import Window

_NUMBERS = {"int": ((int,), "an int"), "float": ((int, float), "a number")}

AdvantageScale = Literal["group", "batch", "none"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of :class:`guard_ops.trainer.Trainer`.

    Args:
        iterations: rollouts, each followed by ``inner_epochs * minibatches`` optimizer steps.
        prompts_per_iteration, group_size: a rollout has so many prompts, and so many samples of
            each.
        inner_epochs: passes over a rollout. The first update is on policy: with one epoch of one
            minibatch the ratio is always 1 and nothing is ever clipped.
        minibatches: optimizer steps of a pass; the samples are split as evenly as they can be,
            without regard to groups (advantages are computed before).
        learning_rate, weight_decay: of AdamW, when the trainer makes the optimizer.
        max_grad_norm: the gradient is scaled down to this norm; ``inf`` for never.
        ema_decay: decay of the average of the weights, 0 <= d < 1; at 0 it is the weights.
        steps: denoising steps of a rollout, as the policy's scheduler makes them.
        noise_level, sde: noise level and kind of every step, as :class:`guard_ops.SdeSchedule` has
            them; or one for each.
        window: which steps are stochastic, and which are trained.
        micro_batch: how many transitions (samples at a step) one backward holds activations of;
            None for all of an update's. It changes memory and time, and no result.
        rollout_batch: how many samples a call of the network without a graph has; None for a
            rank's part of an update.
        advantage_scale: what divides a reward's distance from its group's mean: the spread of the
            "group" or of the whole "batch", or nothing ("none").
        reward_retries: how often a batch is given to the reward again after an error, an answer
            that is not finite or not [B], or none in time; then the run stops.
        reward_timeout: seconds that the reward may take for a batch; None: any.
        reward_overlap: the reward works in a thread while the next samples are made. Like the two
            before, it changes no result.
        seed: of prompts, initial latents and every step's noise.
        evaluate_every: iterations between calls of ``evaluate``; also after the last.
        checkpoint_every: iterations between checkpoints, also after the last; 0 for none at all.
        keep_checkpoints: how many of the newest to keep.
        tensorboard: write event files beside ``metrics.jsonl``.

    Raises:
        ValueError, TypeError: the message names the argument, what it got and what it needs.
    """

    iterations: int = 120
    prompts_per_iteration: int = 10
    group_size: int = 16
    steps: int = 10
    noise_level: float | Sequence[float] = 0.7
    sde: SdeKind | Sequence[SdeKind] = "flow_sde"
    window: Window = field(default_factory=Window)
    micro_batch: int | None = None
    rollout_batch: int | None = None
    inner_epochs: int = 2
    minibatches: int = 2
    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.99
    advantage_scale: AdvantageScale = "group"
    reward_retries: int = 1
    reward_timeout: float | None = None
    reward_overlap: bool = False
    seed: int = 0
    evaluate_every: int = 10
    checkpoint_every: int = 10
    keep_checkpoints: int = 3
    tensorboard: bool = True

    def __post_init__(self) -> None:
        lowest = {"group_size": 2, "seed": 0, "checkpoint_every": 0, "reward_retries": 0}
        for each in fields(self):
            name, value = each.name, getattr(self, each.name)
            wanted = _NUMBERS.get(str(each.type).removesuffix(" | None"))
            if value is None and str(each.type).endswith("None"):
                continue
            if wanted and (isinstance(value, bool) or not isinstance(value, wanted[0])):
                raise TypeError(f"`{name}` is {value!r}; it needs {wanted[1]}")
            if str(each.type).startswith("int") and value < lowest.get(name, 1):
                raise ValueError(f"`{name}` is {value}; it needs >= {lowest.get(name, 1)}")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it needs > 0")
        for name in ("learning_rate", "weight_decay"):
            if not (0 <= getattr(self, name) < math.inf):
                raise ValueError(f"`{name}` is {getattr(self, name)}; it needs >= 0 and finite")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` is {self.ema_decay}; it needs 0 <= ema_decay < 1")
        if self.advantage_scale not in get_args(AdvantageScale):
            raise ValueError(
                f"`advantage_scale` is {self.advantage_scale!r}; it needs one of "
                f"{', '.join(get_args(AdvantageScale))}"
            )
        self.window.steps(self.steps)
        if self.minibatches > self.samples:
            raise ValueError(
                f"`minibatches` is {self.minibatches} for the {self.samples} samples of a rollout "
                "(prompts_per_iteration * group_size); it needs at most that"
            )
        if self.reward_timeout is not None and not 0 < self.reward_timeout < math.inf:
            raise ValueError(
                f"`reward_timeout` is {self.reward_timeout}; it needs > 0 and finite, or None"
            )
        for name in ("tensorboard", "reward_overlap"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` is {getattr(self, name)!r}; it needs a bool")
        if self.seed >= 2**63:
            raise ValueError(f"`seed` is {self.seed}; it needs < 2**63")

    @property
    def samples(self) -> int:
        """How many samples a rollout has, on all ranks together."""
        return self.prompts_per_iteration * self.group_size
