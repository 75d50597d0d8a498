"""An exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from .engine import local


class Ema:
    """``average <- decay * average + (1 - decay) * weights`` after every optimizer step.

    The decay grows into place as ``min(decay, (1 + n) / (10 + n))`` over updates n = 1, 2, ..., so
    that the first weights do not weigh on a short run. Averages are float32 at least: in bfloat16
    a step of 1 - decay rounds away.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.parameters, self.decay, self.updates = parameters, decay, 0
        self._trained: dict[str, Tensor] | None = None  # the weights while `applied`
        self.average = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        self.refuse_if_applied()
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, p in zip(self.average.values(), self.parameters.values(), strict=True):
            local(average).lerp_(local(p).to(average.dtype), 1 - decay)

    def weights(self) -> Mapping[str, Tensor]:
        """The trained weights, also inside ``applied``."""
        return self.parameters if self._trained is None else self._trained

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the averaged weights inside the ``with`` block, to read only.

        Raises:
            RuntimeError: at the block's end, when something has written to a weight in it, which
                is lost; or the model holds the average already.
        """
        self.refuse_if_applied()
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self._trained = trained
            self._assign(self.average)
            versions = {name: local(p)._version for name, p in self.parameters.items()}
            yield
            changed = [n for n, p in self.parameters.items() if local(p)._version != versions[n]]
        finally:
            self._assign(trained)
            self._trained = None
        if changed:
            raise RuntimeError(
                f"parameter {changed[0]!r} was written to inside `ema.applied()`, where the model "
                "holds the average; that is lost, and the weights are those from before the block"
            )

    def refuse_if_applied(self) -> None:
        """RuntimeError inside ``applied``: what is trained there would be lost."""
        if self._trained is not None:
            raise RuntimeError(
                "the model holds the average of the weights (`ema.applied()`); train outside of "
                "that block"
            )

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            local(p).copy_(local(values[name]))
