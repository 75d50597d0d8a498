"""GuardConfig: which ratio, which clip, which balance."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

RatioNorm = Literal["none", "standardize", "closed_form"]
Balance = Literal["none", "inverse_ratio", "inverse_dt"]
Reduction = Literal["mean", "sum"]
NonFinite = Literal["propagate", "drop"]


@dataclass(frozen=True)
class GuardConfig:
    """The policy objective of :func:`guard_ops.guard_loss`.

    Args:
        ratio_norm: "none" (``r_hat = r``), "standardize" (the article: per step over the batch) or
            "closed_form" (the paper's eq. 8: ``log r_hat = s (log r + kl_old)``; not for ``cps``).
        target_std: the spread ``standardize`` gives ``r_hat``.
        std_floor: where ``std(r - 1)`` is at most this, the step is degenerate (on policy, or one
            sample) and gets ``r_hat = 1 + u - mean(u)``: plain GRPO's gradient.
        detach_stats: treat mean and std as constants of the gradient; False differentiates them.
        clip_low, clip_high: clip ``r_hat`` to ``[1 - clip_low, 1 + clip_high]``.
        adv_clip: clamp advantages to ``+- adv_clip``; ``inf`` for none.
        balance: weights over a sample's K steps: "none" (``1/K``), "inverse_ratio" (the article:
            proportional to ``1 / max(r_hat, weight_floor)``) or "inverse_dt" (``1 / (K |dt|)``).
        weight_floor: lower bound of ``r_hat`` in "inverse_ratio".
        reduction: log-densities are "mean" over a latent's D elements (as every public
            implementation has it) or "sum" (the true density).
        kl_beta: weight of the KL to the reference model; needs ``ref_model_output`` when not 0.
        nonfinite: NaN or Inf in a transition: "propagate" (loss and its own gradient turn NaN) or
            "drop" (means over the finite transitions, its own gradient 0). It never reaches
            another transition's gradient either way.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it needs.
    """

    ratio_norm: RatioNorm = "standardize"
    target_std: float = 1.0
    std_floor: float = 1e-8
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
        choices: dict[str, Any] = {
            "ratio_norm": RatioNorm,
            "balance": Balance,
            "reduction": Reduction,
            "nonfinite": NonFinite,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise ValueError(
                    f"`{name}` is {value!r}; it needs one of {', '.join(get_args(allowed))}"
                )
        if not isinstance(self.detach_stats, bool):
            raise TypeError(f"`detach_stats` is {self.detach_stats!r}; it needs a bool")
        # name -> (zero allowed, infinity allowed)
        numbers = {
            "target_std": (False, False),
            "std_floor": (True, False),
            "clip_low": (True, True),
            "clip_high": (True, True),
            "adv_clip": (False, True),
            "weight_floor": (False, False),
            "kl_beta": (True, False),
        }
        for name, (zero, infinity) in numbers.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"`{name}` is {value!r}; it needs a number")
            if not (value > 0 or (zero and value == 0)) or (value == math.inf and not infinity):
                bound = ">= 0" if zero else "> 0"
                raise ValueError(
                    f"`{name}` is {value}; it needs {bound}{'' if infinity else ' and finite'}"
                )

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
