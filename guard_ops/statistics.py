"""RatioStatistics: RatioNorm's mean and std of each step, over more samples than one call has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .config import RATIO_NORMS, GuardConfig

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
        count, mean, m2: float64 [K] ([] for one step); ``m2`` is the sum of squared deviations.
    """

    def __init__(self, steps: int | None = None, device: torch.device | str | None = None) -> None:
        if isinstance(steps, bool) or not isinstance(steps, (int, type(None))):
            raise TypeError(f"`steps` is {steps!r} ({type(steps).__name__}); it needs an int")
        if steps is not None and steps < 1:
            raise ValueError(f"`steps` is {steps}; it needs a positive int, or None for one step")
        shape = () if steps is None else (steps,)
        self.count = torch.zeros(shape, dtype=torch.float64, device=device)
        self.mean = torch.zeros_like(self.count)
        self.m2 = torch.zeros_like(self.count)

    @property
    def std(self) -> Tensor:
        """Standard deviation with correction 0, [K]; 0 before any update."""
        return (self.m2 / self.count.clamp(min=1)).sqrt()

    @torch.no_grad()
    def update(self, log_ratio: Tensor) -> RatioStatistics:
        """Add ``log_ratio`` [K, B] ([B] for one step), leaving out what is not finite.

        :func:`guard_ops.guard_loss` also leaves out a transition whose advantage is not finite. To
        do the same here, set its ``log_ratio`` to NaN.
        """
        if not isinstance(log_ratio, Tensor):
            raise TypeError(f"`log_ratio` is a {type(log_ratio).__name__}; it needs a tensor")
        if log_ratio.ndim != self.count.ndim + 1 or log_ratio.shape[:-1] != self.count.shape:
            raise ValueError(
                f"`log_ratio` has shape {tuple(log_ratio.shape)}; it needs "
                f"{tuple(self.count.shape)} and the batch"
            )
        u = torch.expm1(log_ratio.double())
        finite = u.isfinite()
        other = RatioStatistics.__new__(RatioStatistics)
        other.count = finite.sum(-1).double()
        u = torch.where(finite, u, 0.0)
        other.mean = u.sum(-1) / other.count.clamp(min=1)
        other.m2 = torch.where(finite, (u - other.mean.unsqueeze(-1)) ** 2, 0.0).sum(-1)
        return self.merge(other)

    @torch.no_grad()
    def merge(self, other: RatioStatistics) -> RatioStatistics:
        """Add other statistics of the same steps."""
        if other.count.shape != self.count.shape:
            raise ValueError(
                f"`other` covers steps of shape {tuple(other.count.shape)} but this "
                f"{tuple(self.count.shape)}"
            )
        count = self.count + other.count
        safe = count.clamp(min=torch.finfo(torch.float64).tiny)
        delta = other.mean - self.mean
        self.m2 = self.m2 + other.m2 + delta**2 * (self.count * other.count / safe)
        self.mean = self.mean + delta * (other.count / safe)
        self.count = count
        return self

    @torch.no_grad()
    def all_reduce(self, group: ProcessGroup | None = None) -> RatioStatistics:
        """Merge over the ranks of ``group`` in rank order, so every rank holds the same bits."""
        mine = torch.stack([self.count, self.mean, self.m2])
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, mine, group=group)
        self.count, self.mean, self.m2 = gathered[0].unbind(0)
        for part in gathered[1:]:
            other = RatioStatistics.__new__(RatioStatistics)
            other.count, other.mean, other.m2 = part.unbind(0)
            self.merge(other)
        return self

    @torch.no_grad()
    def decay(self, factor: float) -> RatioStatistics:
        """Multiply earlier samples' weight by ``factor`` in [0, 1], for a running average."""
        if not 0.0 <= factor <= 1.0:
            raise ValueError(f"`factor` is {factor}; it needs [0, 1]")
        self.count, self.m2 = self.count * factor, self.m2 * factor
        return self

    def __getitem__(self, k: int | slice) -> RatioStatistics:
        """The statistics of some of the steps (a copy)."""
        steps = self.count.numel()
        if self.count.ndim == 0 or (isinstance(k, int) and not -steps <= k < steps):
            of = "one step" if self.count.ndim == 0 else f"{steps} steps"
            raise ValueError(f"`k` is {k}, out of range for the statistics of {of}")
        part = RatioStatistics.__new__(RatioStatistics)
        part.count, part.mean, part.m2 = (
            x[k].clone() for x in (self.count, self.mean, self.m2)
        )  # fmt: skip
        return part

    def state_dict(self) -> dict[str, Tensor]:
        """``count``, ``mean`` and ``m2``, to save with a checkpoint."""
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` gave, which has to be for the same number of steps."""
        for name in ("count", "mean", "m2"):
            if name not in state:
                raise ValueError(f"`state` lacks {name!r}; it needs what state_dict() gave")
            if state[name].shape != self.count.shape:
                raise ValueError(
                    f"`state[{name!r}]` has shape {tuple(state[name].shape)}; it needs "
                    f"{tuple(self.count.shape)}"
                )
        self.count, self.mean, self.m2 = (
            state[name].to(self.count) for name in ("count", "mean", "m2")
        )


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
    return statistics.mean, statistics.std
