"""Small operands that the frameworks' cases share; the same numbers at every call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BATCH = 3
STEPS = 6
SAMPLING = ("given", "its default", "a generator", "generators")  # the next latents: or drawn from
LEARNS = (True, False)  # whether the velocity requires a gradient


def noise(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers of their own generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def transition(chosen: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Velocity, x, and y (None where it is to be drawn) of ``_shape``, ``_dtype``, ``_learns``."""
    shape = (BATCH, *chosen["_shape"])
    v, x = noise(shape, 1, chosen["_dtype"]), noise(shape, 2, chosen["_dtype"])
    v.requires_grad_(chosen["_learns"])
    # near x, as a step's sample is
    y = (x.float() + 0.3 * noise(shape, 3)).to(x.dtype) if chosen["_sampling"] == "given" else None
    return v, x, y


def generators(sampling: str) -> Any:
    """What a function's ``generator`` gets."""
    if sampling == "generators":
        return [torch.Generator().manual_seed(30 + i) for i in range(BATCH)]
    return torch.Generator().manual_seed(30) if sampling == "a generator" else None


def step_numbers(which: str) -> list[int]:
    """The step of each sample."""
    return {
        "first": [0] * BATCH,
        "middle": [3] * BATCH,
        "last": [STEPS - 1] * BATCH,
        "mixed": [4, 0, 2],
    }[which]


def optional(chosen: dict[str, Any]) -> dict[str, Any]:
    """Of what was chosen, what is passed as it is."""
    return {name: value for name, value in chosen.items() if not name.startswith("_")}
