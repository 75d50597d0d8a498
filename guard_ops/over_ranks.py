"""The fused loss over ranks: what ``backend.guard_loss`` returns, with other ranks' numbers in it.

A backend's ``guard_loss`` forms its sums and uses them at once. Here ranks exchange numbers in
between, so it is taken apart: ``sums``, ``ratio_statistics`` and ``evaluate``, ``gradient``. Each
group exchanges once, and the loss that is composed of plain PyTorch exchanges the same, so that
ranks need not go the same way.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import objective as objectives
from . import ranks
from .config import GuardConfig, Objective
from .statistics import merged
from .transitions import Rows, Transitions, counted


class Groups(NamedTuple):
    """The process groups of a loss; None where no other rank's numbers enter."""

    latent: Any  # whose ranks have other parts of the same latents
    process: Any  # whose ranks have other samples; None for a norm without statistics


def guard_loss(
    backend: ModuleType,
    groups: Groups,
    config: GuardConfig,
    t: Transitions,
    rows: Rows,  # elements and std_floor are found here where latents are shared out
    objective: Objective,
    cond: bool,
    uncond: bool,
) -> tuple[Tensor, ...]:
    """What ``backend.guard_loss(t, rows, objective, cond, uncond)`` returns.

    The operands are read twice, by ``sums`` and by ``gradient``, and the host waits for nothing.
    """
    sums = backend.sums(t)
    if groups.latent is not None:
        sums, elements = whole_latents(sums, counted(t), groups.latent)
        rows = rows._replace(elements=elements)
    if groups.process is not None:
        found = backend.ratio_statistics(sums, t, rows, objective)
        rows = rows._replace(statistics=of_all_ranks(found, config, objective, groups.process))
    elif rows.statistics is not None and objective.named()["rounding"] != 0:
        # their floor depends on the size of the whole latents
        _, _, _, square, count = backend.ratio_statistics(sums, t, rows, objective)
        floor = objectives.std_floor(square / count, config, objective.named()["rounding"])
        rows = rows._replace(statistics=torch.cat([rows.statistics[:2], floor.unsqueeze(0)]))
    loss, per_row, metrics, sum_grads = backend.evaluate(sums, t, rows, objective)
    grads: tuple[Tensor | None, Tensor | None] = (None, None)
    if cond or uncond:
        grads = backend.gradient(t, sum_grads, cond, uncond)
    grad, grad_uncond = (
        t.latents.model_output.new_empty(0) if each is None else each for each in grads
    )
    return loss, grad, grad_uncond, per_row, metrics, sum_grads


def whole_latents(
    sums: Tensor,  # [3, K, B] of a part of each latent
    counted: Tensor,  # [K, B]: how many elements the part has
    group: Any,
) -> tuple[Tensor, Tensor]:
    """The sums of the whole latents, and their D [K, B], at least 1."""
    total = ranks.total(torch.cat([sums, counted.unsqueeze(0)]), group)
    return total[:3], total[3].clamp(min=1)


def of_all_ranks(
    found: Tensor,  # [5, K] of objective.ratio_statistics
    config: GuardConfig,
    objective: Objective,
    group: Any,
) -> Tensor:
    """Mean and std of each step over all ranks' samples, and its std_floor, [3, K] float64.

    Every rank computes the same of the same numbers in the same order, so all have the same bits.
    """
    parts = ranks.gather(found, group)
    count, mean, root_m2 = merged(parts[:, :3])
    square, samples = parts[:, 3:].sum(0)
    floor = objectives.std_floor(square / samples, config, objective.named()["rounding"])
    return torch.stack([mean, objectives.std_of(count, root_m2), floor])
