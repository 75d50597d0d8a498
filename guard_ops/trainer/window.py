"""Which steps of a rollout are stochastic, and which are trained.

A deterministic step is a step whose coefficients have noise level 0: the rollout has no other case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

import guard_ops as go
from guard_ops.schedule import SDE_RULES, SdeKind

from .draws import generator

Kind = Literal["all", "subset", "subset_per_sample", "random_window", "sliding_window"]


@dataclass(frozen=True)
class Window:
    """Which steps of ``range(N)[first:last]`` are trained.

    Args:
        kind: "all" of them; a random "subset" of ``size``, the same for all samples or with
            "subset_per_sample" each sample's own (DanceGRPO); ``size`` in a row, at a random place
            ("random_window", Flow-GRPO-Fast) or at one that moves on by ``stride`` every ``every``
            iterations and begins again at the end ("sliding_window", MixGRPO).
        size: how many; all of the range if None.
        first, last: the range, as in a slice; by default all steps but the last.
        outside: steps that are not trained are sampled with the same noise ("sde") or none ("ode").
        branch: the samples of a group share their initial latents, and the noise of the steps
            before the first trained one, so that they part where training begins.

    Raises:
        ValueError, TypeError: the message names the argument, what it got and what it needs.
    """

    kind: Kind = "all"
    size: int | None = None
    first: int = 0
    last: int | None = -1
    every: int = 25
    stride: int = 1
    outside: Literal["sde", "ode"] = "sde"
    branch: bool = False

    def __post_init__(self) -> None:
        for name, known in (("kind", get_args(Kind)), ("outside", ("sde", "ode"))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}; it needs one of {', '.join(known)}"
                )
        for name, lowest in (("size", 1), ("every", 1), ("stride", 1)):
            value = getattr(self, name)
            if value is None and name == "size":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ValueError(f"`{name}` is {value!r}; it needs an int >= {lowest}")
        if self.outside == "ode" and self.kind == "subset_per_sample":
            raise ValueError(
                "`outside` is 'ode' with `kind` 'subset_per_sample', where each step is trained "
                "for some samples; it needs 'sde'"
            )

    def steps(self, n: int) -> list[int]:
        """The steps of n that may be trained.

        Raises:
            ValueError: none may, or fewer than ``size``.
        """
        steps = list(range(n))[self.first : self.last]
        if not steps:
            raise ValueError(
                f"`window` leaves none of the {n} steps to train: "
                f"range({n})[{self.first}:{self.last}] is empty"
            )
        if self.size is not None and self.size > len(steps):
            raise ValueError(
                f"`window.size` is {self.size}, more than the {len(steps)} steps of "
                f"range({n})[{self.first}:{self.last}]"
            )
        return steps

    def draw(self, n: int, samples: int, seed: int, iteration: int) -> list[list[int]]:
        """The trained steps of n, of all samples together ([K] in one row) or of each ([S][K])."""
        steps = self.steps(n)
        size = len(steps) if self.size is None else self.size
        places = len(steps) - size + 1
        dice = generator(seed, iteration, "window")
        if self.kind == "all":
            return [steps]
        if self.kind == "sliding_window":
            start = iteration // self.every * self.stride % places
            return [steps[start : start + size]]
        if self.kind == "random_window":
            start = int(torch.randint(places, (), generator=dice))
            return [steps[start : start + size]]
        rows = samples if self.kind == "subset_per_sample" else 1
        chosen = torch.rand(rows, len(steps), generator=dice).argsort(1)[:, :size].sort(1).values
        return [[steps[k] for k in row] for row in chosen.tolist()]


class Noise:
    """Each step's coefficients, with a noise level and a kind of SDE of its own.

    Args:
        sigmas: N + 1, as :class:`guard_ops.SdeSchedule` takes them.
        noise_level, kind: one for all steps, or N of them.
    """

    def __init__(
        self,
        sigmas: Sequence[float],
        noise_level: float | Sequence[float],
        kind: SdeKind | Sequence[SdeKind],
        device: torch.device,
    ) -> None:
        n = len(sigmas) - 1
        levels = _each("noise_level", noise_level, n)
        kinds = _each("sde", kind, n)
        made = {
            which: go.SdeSchedule(sigmas, *which, device=device)
            for which in set(zip(levels, kinds, strict=True))
        }
        self.steps = [made[levels[k], kinds[k]][k] for k in range(n)]
        self.ode = list(go.SdeSchedule(sigmas, 0.0, device=device))
        self.kinds = kinds
        self.table = torch.stack([step.table for step in self.steps], 1)  # [5, N]

    def plan(self, trained: list[list[int]], outside: str) -> Plan:
        """The steps of a rollout in which ``trained`` ([1][K] or [n][K]) are trained.

        Raises:
            ValueError: one of them has no noise, or they mix kinds whose densities differ.
        """
        used = sorted({k for row in trained for k in row})
        for k in used:
            if self.steps[k].deterministic:
                raise ValueError(
                    f"step {k} is to be trained but has no noise (`noise_level`, or the last step "
                    "of cps); leave it out with `window`"
                )
        gaussian = {SDE_RULES[self.kinds[k]].gaussian for k in used}
        if len(gaussian) > 1:
            raise ValueError("`sde` mixes cps with other kinds among the trained steps")
        rollout = [
            self.steps[k] if outside == "sde" or k in used else self.ode[k]
            for k in range(len(self.steps))
        ]
        steps = torch.tensor(trained, device=self.table.device).T.contiguous()  # [K, 1] or [K, n]
        table = self.table[:, steps]
        table = table[..., 0] if len(trained) == 1 else table
        coeffs = go.StepCoefficients._of(table, gaussian.pop(), ())
        return Plan(rollout, steps, coeffs, used[0])


class Plan(NamedTuple):
    """The steps of one iteration."""

    rollout: list[go.StepCoefficients]  # N of shape []
    steps: Tensor  # [K, 1] or [K, n] int64, the trained ones
    coeffs: go.StepCoefficients  # theirs, of shape [K] or [K, n]
    first: int  # the first that any sample trains

    def of(self, rows: Tensor) -> Tensor:
        """The trained steps of some samples, [K, 1] or [K, b]."""
        return self.steps if self.steps.shape[1] == 1 else self.steps[:, rows]

    def coefficients(self, rows: Tensor) -> go.StepCoefficients:
        """The trained steps' coefficients of some samples."""
        if len(self.coeffs.shape) == 1:
            return self.coeffs
        return go.StepCoefficients._of(self.coeffs.table[..., rows], self.coeffs.gaussian, ())


def _each(name: str, value: Any, n: int) -> list[Any]:
    values = [value] * n if isinstance(value, (str, float, int)) else list(value)
    if len(values) != n:
        raise ValueError(f"`{name}` has {len(values)} values; it needs one, or {n}")
    return values
