"""Advantages of each reward before their sum (GDPO, arXiv:2601.05242)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import guard_ops as go

from .config import AdvantageScale

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def decoupled_advantages(
    rewards: Mapping[str, Tensor],  # each [B]
    weights: Mapping[str, float],
    groups: Tensor,  # [B]
    *,
    scale: AdvantageScale = "group",
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """``sum_r w_r A_r``, brought to mean 0 and spread 1 over the whole batch; [B].

    ``A_r`` are :func:`guard_ops.group_advantages` of reward r alone. Advantages of a weighted sum
    lose what tells its rewards apart: where one of two rewards spreads wider, the other has next to
    no say, and groups of different outcomes get the same advantages.

    Raises:
        ValueError: a weight is of no reward.
    """
    for name in weights:
        if name not in rewards:
            raise ValueError(
                f"`advantage_weights` has {name!r}; the reward's parts are {', '.join(rewards)}"
            )
    each = [
        weight
        * go.group_advantages(rewards[name], groups, scale=scale, process_group=process_group)
        for name, weight in weights.items()
    ]
    total = torch.stack(each).sum(0)
    return go.group_advantages(total, scale="group", process_group=process_group)
