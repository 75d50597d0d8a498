"""GRPO's advantages: rewards relative to the other samples of the same prompt."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import ranks
from .checks import check_choice, check_dense, check_number
from .objective import masked_std
from .transitions import check_tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def group_advantages(
    rewards: Tensor,
    groups: Tensor | None = None,
    *,
    scale: Literal["group", "batch", "none"] = "group",
    eps: float = 1e-4,
    without_spread: Literal["zero", "nan"] = "zero",
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """GRPO's advantages: rewards relative to the other samples of the same prompt.

    ``A_i = (R_i - mean(group)) / (std + eps)`` with ``std`` (correction 0) of the group, of the
    whole batch, or no division (Dr. GRPO). A reward that is not finite gives a NaN advantage and
    takes no part in its group's statistics. Time and memory are linear in B but for a sort, and the
    host does not wait for a device (with ``process_group`` for the ranks' sizes only).

    Args:
        rewards: [B], floating.
        groups: LongTensor [B], the prompt of each sample; None: all one group.
        scale: whose spread divides: "group", "batch" or "none".
        eps: added to the spread; at least 0.
        without_spread: the advantages of a group whose rewards are all the same: "zero", or "nan".
            A zero teaches nothing, but its sample counts in the loss's mean. With "nan" and
            ``GuardConfig(nonfinite="drop")`` the mean is over the other samples (dynamic sampling,
            DAPO arXiv:2503.14476).
        process_group: the ranks that groups and the batch span; each rank gets its own samples'
            advantages. Ranks may have different B.

    Returns:
        [B], dtype of ``rewards``.

    Raises:
        ValueError, TypeError: the message names the argument, what it got and what it needs.
    """
    groups = _check(rewards, groups, scale, eps, without_spread)
    eps = float(eps)
    wide, before = rewards.double(), 0  # before: how many samples the ranks before this one have
    if process_group is not None:
        ranks.check_group("process_group", process_group)
        parts = ranks.gather_uneven(wide, process_group)
        groups = torch.cat(ranks.gather_uneven(groups, process_group))
        before = sum(len(part) for part in parts[: dist.get_rank(process_group)])
        wide = torch.cat(parts)
    finite = wide.isfinite()
    wide = torch.where(finite, wide, 0.0)
    found = _by_group(wide, finite, groups)
    if scale == "none":
        advantages = found.centred
    elif scale == "group":
        advantages = found.centred / (found.std + eps)
    else:
        advantages = found.centred / (masked_std(wide, finite) + eps)
    rest = 0.0 if without_spread == "zero" else math.nan
    advantages = torch.where(found.spread, advantages, rest)
    advantages = torch.where(finite, advantages, math.nan)
    return advantages[before : before + len(rewards)].to(rewards.dtype)


class _Groups(NamedTuple):
    """What each sample's group makes of it, [B]; all of the finite rewards."""

    centred: Tensor  # the reward less the group's mean
    std: Tensor  # of the group
    spread: Tensor  # bool: whether the group's rewards differ


def _by_group(rewards: Tensor, finite: Tensor, groups: Tensor) -> _Groups:
    """Sorts samples by group, so that each group is a segment, whose sums have a fixed order."""
    order = groups.argsort(stable=True)
    sorted_groups = groups[order]
    segment = (sorted_groups.diff(prepend=sorted_groups[:1]) != 0).cumsum(0)  # [B], from 0
    samples = torch.arange(len(rewards) + 1, device=rewards.device)
    offsets = torch.searchsorted(segment, samples)  # there may be as many groups as samples

    def each(values: Tensor, reduce: str, rest: float) -> Tensor:
        """A group's sum, max or min of its finite samples, for every sample, [B]."""
        values = torch.where(finite, values, rest)[order]
        found = torch.segment_reduce(values, reduce, offsets=offsets, unsafe=True, initial=rest)
        return torch.empty_like(values).index_put_((order,), found[segment])

    # Each group's numbers are made of order 1, so that no square or sum of them overflows. A power
    # of two rounds nothing.
    exponent = torch.frexp(each(rewards.abs(), "max", 0.0)).exponent.double()
    unit = torch.exp2((exponent - 1).clamp(min=-1021))
    scaled = rewards / unit
    count = each(torch.ones_like(rewards), "sum", 0.0).clamp(min=1)
    centred = scaled - each(scaled, "sum", 0.0) / count
    std = (each(centred**2, "sum", 0.0) / count).sqrt()
    spread = each(rewards, "max", -math.inf) > each(rewards, "min", math.inf)
    return _Groups(centred * unit, std * unit, spread)


def _check(
    rewards: Tensor, groups: Tensor | None, scale: str, eps: float, without_spread: str
) -> Tensor:
    """Raises for an argument of no use; returns the groups, which are one if there are none."""
    check_tensor("rewards", rewards)
    if rewards.ndim != 1 or rewards.numel() == 0:
        raise ValueError(f"`rewards` has shape {tuple(rewards.shape)}; it needs [B], B > 0")
    check_choice("scale", scale, ("group", "batch", "none"))
    check_choice("without_spread", without_spread, ("zero", "nan"))
    if not 0 <= check_number("eps", eps) < math.inf:
        raise ValueError(f"`eps` is {eps}; it needs >= 0 and finite")
    if groups is None:
        return torch.zeros(rewards.shape, dtype=torch.int64, device=rewards.device)
    if not isinstance(groups, Tensor):
        raise TypeError(f"`groups` is a {type(groups).__name__}; it needs a tensor")
    check_dense("groups", groups)
    if groups.shape != rewards.shape or groups.dtype != torch.int64:
        raise ValueError(
            f"`groups` is a {groups.dtype} tensor of shape {tuple(groups.shape)}; it needs "
            f"torch.int64 of shape {tuple(rewards.shape)}"
        )
    if groups.device != rewards.device:
        raise ValueError(f"`groups` is on {groups.device} but `rewards` on {rewards.device}")
    return groups
