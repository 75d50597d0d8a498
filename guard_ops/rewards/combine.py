"""Several rewards at once: a weighted sum, or advantages of each before the sum (GDPO)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..trainer.policy import Reward, Scores


class Combined:
    """``sum_r w_r R_r`` of rewards by name; each is a part, and its own parts are ``name/part``.

    Args:
        rewards: by their names.
        weights: a finite number for each, by default 1; not all 0.
        advantages: "summed": the advantages are the sum's. "separate": of each reward alone, then
            summed with the weights and brought to spread 1 over the batch (GDPO,
            arXiv:2601.05242); no reward's scale then decides how much it is heard.

    Raises:
        ValueError: fewer than two rewards, as many weights as that are not, or another word.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        weights: Sequence[float] | None = None,
        advantages: str = "summed",
    ) -> None:
        if len(rewards) < 2:
            raise ValueError(f"`reward` has {len(rewards)} rewards to combine; it needs 2 or more")
        given = [1.0] * len(rewards) if weights is None else list(weights)
        if len(given) != len(rewards):
            raise ValueError(
                f"`reward_weights` has {len(given)} numbers for the {len(rewards)} rewards "
                f"{', '.join(rewards)}"
            )
        if not all(math.isfinite(x) for x in given) or not any(given):
            raise ValueError(f"`reward_weights` is {given}; it needs finite numbers, not all 0")
        if advantages not in ("summed", "separate"):
            raise ValueError(f"`reward_advantages` is {advantages!r}; it needs summed or separate")
        self.rewards = dict(rewards)
        self.weights = dict(zip(rewards, map(float, given), strict=True))
        if advantages == "separate":
            self.advantage_weights = self.weights
        self.__name__ = "+".join(rewards)

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """Raises ValueError for a prompt that one of the rewards cannot judge."""
        for reward in self.rewards.values():
            call(reward, "check_prompts", prompts, metadata)

    def fetch(self) -> None:
        """Download what is not there; nothing is loaded."""
        for reward in self.rewards.values():
            call(reward, "fetch")

    def prepare(self, device: torch.device) -> None:
        """Load what the rewards need."""
        for reward in self.rewards.values():
            call(reward, "prepare", device)

    def __call__(
        self, pixels: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Scores:
        """[B], of pixels [B, 3, H, W] or [B, F, 3, H, W] in [0, 1].

        Raises:
            ValueError: a reward returned something else than [B]; names it.
        """
        parts: dict[str, Tensor] = {}
        total = torch.zeros(len(prompts), dtype=torch.float64, device=pixels.device)
        for name, reward in self.rewards.items():
            found = reward(pixels, prompts, metadata)
            scores = found if isinstance(found, Scores) else Scores(found, {})
            if not isinstance(scores.total, Tensor) or scores.total.shape != total.shape:
                got = getattr(scores.total, "shape", type(scores.total).__name__)
                raise ValueError(f"{name} returned {got} for {len(prompts)} samples")
            parts[name] = scores.total.to(total)
            parts |= {f"{name}/{part}": x.to(total) for part, x in scores.parts.items()}
            total = total + self.weights[name] * parts[name]
        return Scores(total, parts)


def call(reward: Reward, method: str, *arguments: Any) -> None:
    """Call a method that a reward may have: ``check_prompts``, ``fetch``, ``prepare``."""
    found = getattr(reward, method, None)
    if found is not None:
        found(*arguments)
