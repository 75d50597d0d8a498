"""All that training changes: the weights, their average, the optimizer, how far it has come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from .ema import Ema

MakeOptimizer: TypeAlias = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass
class Learner:
    parameters: dict[str, nn.Parameter]  # those that are trained
    optimizer: torch.optim.Optimizer
    ema: Ema
    iteration: int = 0  # how many are done
