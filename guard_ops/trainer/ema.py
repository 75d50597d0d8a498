"""An exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Ema:
    """``average <- decay * average + (1 - decay) * weights`` after every optimizer step.

    The decay grows into place as ``min(decay, (1 + n) / (10 + n))`` over updates n = 1, 2, ..., so
    that the first weights do not weigh on a short run. Averages are float32 at least: in bfloat16
    a step of 1 - decay rounds away.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.parameters, self.decay, self.updates = parameters, decay, 0
        self.average = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, p in zip(self.average.values(), self.parameters.values(), strict=True):
            average.lerp_(p.to(average.dtype), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the averaged weights inside the ``with`` block."""
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._assign(self.average)
        try:
            yield
        finally:
            self._assign(trained)

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(values[name])
