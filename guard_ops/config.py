"""GuardConfig, the settings of the objective, and Objective, the form in which kernels get them."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch

from .checks import check_choice, check_number, describe

RatioNorm = Literal["none", "standardize", "closed_form"]
Balance = Literal["none", "inverse_ratio", "inverse_dt"]
Reduction = Literal["mean", "sum"]
NonFinite = Literal["propagate", "drop"]


class NormNeeds(NamedTuple):
    """What a ``ratio_norm`` has to know besides its transition's log-ratio."""

    statistics: bool  # it needs the mean and the std of its step over the batch
    debiased: bool  # it normalizes log r + kl_old, so it needs the old mean and a Gaussian kappa


RATIO_NORMS: dict[RatioNorm, NormNeeds] = {
    "none": NormNeeds(statistics=False, debiased=False),
    "standardize": NormNeeds(statistics=True, debiased=False),
    "closed_form": NormNeeds(statistics=False, debiased=True),
}

# Every language takes the objective's values in the order of these three. csrc/objective.h lists
# the same names, which backends/compiled.py compares; kernels/objective.py reads them from here.
CHOICES: dict[str, tuple[str, ...]] = {
    "ratio_norm": get_args(RatioNorm),
    "balance": get_args(Balance),
    "reduction": get_args(Reduction),
    "nonfinite": get_args(NonFinite),
}
FLAGS = ("detach_stats", "gaussian")  # `gaussian` comes from the coefficients, not the config
AUTO_STD_FLOOR = 1e-8  # std_floor="auto", where rounding of the velocities alone makes less
NUMBERS: dict[str, tuple[bool, bool]] = {  # name -> (zero is allowed, infinity is allowed)
    "target_std": (False, False),
    "std_floor": (True, False),
    "clip_low": (True, True),
    "clip_high": (True, True),
    "adv_clip": (False, True),
    "weight_floor": (False, False),
    "kl_beta": (True, False),
}
# All of an objective's; `rounding` comes from a call's velocities (rounding_of).
OBJECTIVE_NUMBERS = (*NUMBERS, "rounding")


class Objective(NamedTuple):
    """A GuardConfig, and whether the densities are Gaussian, as operators and kernels take them."""

    choices: tuple[int, ...]  # for each of CHOICES the index of the chosen name; then FLAGS
    numbers: tuple[float, ...]  # in the order of OBJECTIVE_NUMBERS

    def chosen(self) -> dict[str, int]:
        """The choices and flags by name."""
        return dict(zip((*CHOICES, *FLAGS), self.choices, strict=True))

    def named(self) -> dict[str, float]:
        """The numbers by name."""
        return dict(zip(OBJECTIVE_NUMBERS, self.numbers, strict=True))

    def needs(self) -> NormNeeds:
        """What the chosen ``ratio_norm`` has to know."""
        names = CHOICES["ratio_norm"]
        return RATIO_NORMS[names[self.chosen()["ratio_norm"]]]  # type: ignore[index]


@dataclass(frozen=True)
class GuardConfig:
    """The policy objective of :func:`guard_ops.guard_loss`.

    Args:
        ratio_norm: "none" (``r_hat = r``), "standardize" (the article: per step over the batch) or
            "closed_form" (the paper's eq. 8: ``log r_hat = s (log r + kl_old)``; not for ``cps``).
        target_std: the spread ``standardize`` gives ``r_hat``.
        std_floor: where ``std(r - 1)`` is at most this, the step is degenerate (on policy, or one
            sample) and gets ``r_hat = 1 + u - mean(u)``: plain GRPO's gradient. "auto" is 1e-8, and
            for velocities of 16 bits at least four times what their rounding alone would make of
            each step's std, though never more than ``target_std``; see docs/math.md.
        detach_stats: treat mean and std as constants of the gradient; False differentiates them.
        clip_low, clip_high: clip ``r_hat`` to ``[1 - clip_low, 1 + clip_high]``.
        adv_clip: clamp advantages to ``+- adv_clip``; ``inf`` for none.
        balance: weights over a sample's K steps: "none" (``1/K``), "inverse_ratio" (the article:
            proportional to ``1 / max(r_hat, weight_floor)``) or "inverse_dt" (``1 / (K |dt|)``).
        weight_floor: lower bound of ``r_hat`` in "inverse_ratio".
        reduction: log-densities are "mean" over a latent's D elements (as every public
            implementation has it) or "sum" (the true density).
        kl_beta: weight of the KL to the reference model; needs ``ref_model_output`` when not 0.
        nonfinite: what a NaN or Inf in a transition does: with "propagate" the loss and that
            transition's gradient turn NaN; with "drop" means are over the finite transitions and
            its gradient is 0. Either way it never reaches another transition's gradient.

    Raises:
        ValueError, TypeError: the message names the argument, what it got and what it needs.
    """

    ratio_norm: RatioNorm = "standardize"
    target_std: float = 1.0
    std_floor: float | Literal["auto"] = "auto"
    detach_stats: bool = True
    clip_low: float = 0.2
    clip_high: float = 0.2
    adv_clip: float = 5.0
    balance: Balance = "none"
    weight_floor: float = 0.1
    reduction: Reduction = "mean"
    kl_beta: float = 0.0
    nonfinite: NonFinite = "propagate"

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        if not isinstance(self.detach_stats, bool):
            raise TypeError(f"`detach_stats` is {describe(self.detach_stats)}; it needs a bool")
        for name, (zero, infinity) in NUMBERS.items():
            given = getattr(self, name)
            if name == "std_floor" and isinstance(given, str) and given == "auto":
                continue
            value = check_number(name, given)
            if not (value > 0 or (zero and value == 0)) or (value == math.inf and not infinity):
                bound = ">= 0" if zero else "> 0"
                raise ValueError(
                    f"`{name}` is {given}; it needs {bound}{'' if infinity else ' and finite'}"
                )
            if value == math.inf:  # also of an int that no float can represent
                object.__setattr__(self, name, value)

    @property
    def least_std_floor(self) -> float:
        """``std_floor`` as a number; "auto" may be more in a call, as its docstring says."""
        return AUTO_STD_FLOOR if self.std_floor == "auto" else float(self.std_floor)

    @classmethod
    def article(cls, **overrides: Any) -> GuardConfig:
        """GRPO-Guard as its authors' article describes it: standardize, clip 0.2, inverse_ratio.

        (*How GRPO-Guard Stops Over-Optimization in Flow-Based Visual Generators*, Kuaishou.)
        """
        return dataclasses.replace(cls(balance="inverse_ratio"), **overrides)

    @classmethod
    def paper(cls, **overrides: Any) -> GuardConfig:
        """GRPO-Guard as arXiv:2510.22319 publishes it: closed_form, clip 2e-6, inverse_dt."""
        base = cls("closed_form", clip_low=2e-6, clip_high=2e-6, balance="inverse_dt")
        return dataclasses.replace(base, **overrides)

    @classmethod
    def flow_grpo(cls, **overrides: Any) -> GuardConfig:
        """Flow-GRPO (arXiv:2505.05470): the raw ratio, clip 1e-4, no balance."""
        return dataclasses.replace(cls("none", clip_low=1e-4, clip_high=1e-4), **overrides)

    @classmethod
    def dance_grpo(cls, **overrides: Any) -> GuardConfig:
        """DanceGRPO (arXiv:2505.07818): the raw ratio, clip 1e-4, no balance."""
        return cls.flow_grpo(**overrides)


def rounding_of(
    config: GuardConfig, velocities: tuple[torch.dtype, ...], guidance_scale: float
) -> float:
    """How large an error of the velocities ``std_floor="auto"`` has to allow for.

    Two velocities that are equal but for their rounding to a dtype of epsilon ``eps`` differ by
    about ``eps / 4`` of their size, which is sqrt(2) for a flow between unit variances; four times
    that is ``sqrt(2) eps``. 0 for float32 and float64, and for a floor that is a number.

    Args:
        velocities: their dtypes, old and new.
        guidance_scale: g of ``uncond + g (v - uncond)``, which adds the errors of both; else 1.
    """
    if config.std_floor != "auto":
        return 0.0
    eps = [torch.finfo(dtype).eps for dtype in velocities if torch.finfo(dtype).bits == 16]
    return max(eps, default=0.0) * math.sqrt(2) * math.hypot(guidance_scale, 1 - guidance_scale)


@functools.lru_cache(maxsize=256)
def objective_of(
    config: GuardConfig,
    gaussian: bool,
    velocities: tuple[torch.dtype, ...] = (),
    guidance_scale: float = 1.0,
) -> Objective:
    """The config as kernels take it, for coefficients that are ``gaussian`` or not.

    ``velocities`` and ``guidance_scale`` are those of :func:`rounding_of`.
    """
    named = [allowed.index(getattr(config, name)) for name, allowed in CHOICES.items()]
    flags = {"detach_stats": config.detach_stats, "gaussian": gaussian}
    choices = (*named, *(int(flags[name]) for name in FLAGS))
    values = {name: getattr(config, name) for name in NUMBERS}
    values["std_floor"] = config.least_std_floor
    return Objective(
        choices,
        (
            *(float(values[name]) for name in NUMBERS),
            rounding_of(config, velocities, guidance_scale),
        ),
    )
