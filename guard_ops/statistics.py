"""RatioStatistics: RatioNorm's mean and std of each step, over more samples than one call has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import inference, ranks
from .checks import check_device, check_number, describe
from .config import RATIO_NORMS, GuardConfig
from .objective import moments, representable_ratio, std_of
from .transitions import check_tensor, normal

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class RatioStatistics:
    """Per-step count, mean and squared deviation of ``u = r - 1``, merged as parallel Welford does.

    Micro-batches: first ``update`` with every micro-batch's ``log_ratio`` (no gradient needed),
    then pass the object as ``statistics=`` to each micro-batch's :func:`guard_ops.guard_loss`: the
    ``r_hat`` and the gradient are those of the one large batch. Over ranks: :meth:`all_reduce`.
    Over time: :meth:`decay`, then keep updating.

    Args:
        steps: K, or None for one step.
        device: where the statistics live.

    Attributes:
        count, mean, root_m2: float64 [K] ([] for one step); ``root_m2`` is the square root of the
            sum of squared deviations, which itself overflows where a ratio is above 1e154.
    """

    _STATE = ("count", "mean", "root_m2")

    @inference.lasting
    def __init__(self, steps: int | None = None, device: torch.device | str | None = None) -> None:
        if isinstance(steps, bool) or not isinstance(steps, (int, type(None))):
            raise TypeError(f"`steps` is {describe(steps)}; it needs an int")
        if steps is not None and not 0 < steps < 2**31:
            raise ValueError(f"`steps` is {steps}; it needs a positive int, or None for one step")
        device = check_device("device", device)
        shape = () if steps is None else (steps,)
        self.count = torch.zeros(shape, dtype=torch.float64, device=device)
        self.mean = torch.zeros_like(self.count)
        self.root_m2 = torch.zeros_like(self.count)

    @property
    def m2(self) -> Tensor:
        """The sum of squared deviations, [K]; infinite where it overflows."""
        return self.root_m2**2

    @property
    def std(self) -> Tensor:
        """Standard deviation with correction 0, [K]; 0 before any update."""
        return std_of(self.count, self.root_m2)

    @inference.lasting
    @torch.no_grad()
    def update(self, log_ratio: Tensor) -> RatioStatistics:
        """Add ``log_ratio`` [K, B] ([B] for one step), leaving out what is not finite.

        That includes a log-ratio whose ratio cannot be represented in its dtype (at least float32),
        as it does for :func:`guard_ops.guard_loss`, which also leaves out a transition whose
        advantage, step weight or KL is not finite. To do the same here, set its ``log_ratio`` to
        NaN.
        """
        check_tensor("log_ratio", log_ratio)
        if log_ratio.ndim != self.count.ndim + 1 or log_ratio.shape[:-1] != self.count.shape:
            raise ValueError(
                f"`log_ratio` has shape {tuple(log_ratio.shape)}; it needs "
                f"{tuple(self.count.shape)} and the batch"
            )
        if log_ratio.device != self.count.device:
            raise ValueError(
                f"`log_ratio` is on {log_ratio.device} but these statistics on {self.count.device}"
            )
        if log_ratio.shape[-1] == 0:
            return self
        u, finite = torch.expm1(log_ratio.double()), representable_ratio(log_ratio, log_ratio.dtype)
        return self.merge(self._of(*moments(u, finite)))

    @classmethod
    def _of(cls, count: Tensor, mean: Tensor, root_m2: Tensor) -> RatioStatistics:
        new = cls.__new__(cls)
        new.count, new.mean, new.root_m2 = count, mean, root_m2
        return new

    @inference.lasting
    @torch.no_grad()
    def merge(self, other: RatioStatistics) -> RatioStatistics:
        """Add other statistics of the same steps."""
        if not isinstance(other, RatioStatistics):
            raise TypeError(f"`other` is a {type(other).__name__}; it needs RatioStatistics")
        if other.count.shape != self.count.shape:
            raise ValueError(
                f"`other` covers steps of shape {tuple(other.count.shape)} but this "
                f"{tuple(self.count.shape)}"
            )
        if other.count.device != self.count.device:
            raise ValueError(f"`other` is on {other.count.device} but this on {self.count.device}")
        return self._become(torch.stack([self._numbers(), other._numbers()]))

    @inference.lasting
    @torch.no_grad()
    def all_reduce(self, group: ProcessGroup | None = None) -> RatioStatistics:
        """Merge over the ranks of ``group`` in rank order, so every rank holds the same bits."""
        ranks.check_group("group", group)
        return self._become(ranks.gather(self._numbers(), group))

    def _numbers(self) -> Tensor:
        return torch.stack([self.count, self.mean, self.root_m2])

    def _become(self, parts: Tensor) -> RatioStatistics:  # [R, 3, K]
        self.count, self.mean, self.root_m2 = merged(parts)
        return self

    @inference.lasting
    @torch.no_grad()
    def decay(self, factor: float) -> RatioStatistics:
        """Multiply earlier samples' weight by ``factor`` in [0, 1], for a running average."""
        if not 0.0 <= check_number("factor", factor) <= 1.0:
            raise ValueError(f"`factor` is {factor}; it needs [0, 1]")
        self.count, self.root_m2 = self.count * factor, self.root_m2 * factor**0.5
        return self

    @inference.lasting
    def __getitem__(self, k: int | slice) -> RatioStatistics:
        """The statistics of some of the steps (a copy)."""
        steps = self.count.numel()
        if isinstance(k, bool) or not isinstance(k, (int, slice)):
            raise TypeError(f"`k` is {describe(k)}; it needs an int or a slice")
        if isinstance(k, slice) and k.step is not None and k.step < 1:
            raise ValueError(f"`k` is {k}; it needs a step of at least 1")
        if self.count.ndim == 0 or (isinstance(k, int) and not -steps <= k < steps):
            of = "one step" if self.count.ndim == 0 else f"{steps} steps"
            raise ValueError(f"`k` is {k}, out of range for the statistics of {of}")
        return self._of(self.count[k].clone(), self.mean[k].clone(), self.root_m2[k].clone())

    def state_dict(self) -> dict[str, Tensor]:
        """``count``, ``mean`` and ``root_m2``, to save with a checkpoint."""
        return {name: getattr(self, name) for name in self._STATE}

    @inference.lasting
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` gave, which has to be for the same number of steps."""
        if not isinstance(state, Mapping):
            raise TypeError(f"`state` is {describe(state)}; it needs what state_dict() gave")
        for name in self._STATE:
            if not isinstance(state.get(name), Tensor):
                raise ValueError(f"`state` has no tensor {name!r}; it needs what state_dict() gave")
            if state[name].shape != self.count.shape:
                raise ValueError(
                    f"`state[{name!r}]` has shape {tuple(state[name].shape)}; it needs "
                    f"{tuple(self.count.shape)}"
                )
        for name in self._STATE:
            setattr(self, name, normal(state[name]).to(self.count))


def merged(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and root_m2 [K] of all ``parts`` [R, 3, K], each of which has these three.

    The number of operators does not depend on how many parts there are. What is squared is at most
    1, so that nothing overflows that a result can represent.
    """
    limits = torch.finfo(torch.float64)
    counts, means, roots = parts.unbind(1)
    count = counts.sum(0)
    share = counts / count.clamp(min=limits.tiny)
    mean = means[0] + (share * (means - means[0])).sum(0)  # exact where all are equal
    apart = torch.cat([roots, (means - mean) * counts.sqrt()])
    unit = torch.linalg.vector_norm(apart, math.inf, 0).clamp(limits.tiny, limits.max)
    return count, mean, torch.linalg.vector_norm(apart / unit, dim=0) * unit


def check_statistics(
    statistics: RatioStatistics, config: GuardConfig, steps: torch.Size, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and std, of shape ``steps`` ([K], or [] for one step); raises if they are of no use."""
    if not isinstance(statistics, RatioStatistics):
        raise TypeError(f"`statistics` is a {type(statistics).__name__}; it needs RatioStatistics")
    if not RATIO_NORMS[config.ratio_norm].statistics:
        using = [name for name, needs in RATIO_NORMS.items() if needs.statistics]
        raise ValueError(
            f"`statistics` is given but `config.ratio_norm` is {config.ratio_norm!r}, which has no "
            f"use for it; those that have: {', '.join(using)}"
        )
    if statistics.mean.shape != steps or statistics.mean.device != device:
        raise ValueError(
            f"`statistics` covers steps of shape {tuple(statistics.mean.shape)} on "
            f"{statistics.mean.device}; this call needs {tuple(steps)} on {device}"
        )
    return normal(statistics.mean), normal(statistics.std)
