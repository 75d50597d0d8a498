"""The backends that tests of CPU tensors run over, on this machine and in this process."""

from __future__ import annotations

import torch

import guard_ops as go
from guard_ops.backends import select, use_backend


def backends_for_cpu_tensors() -> tuple[str, ...]:
    """What these tests run over; on the device, the kernels' own do (tests/kernels)."""

    def runs(name: str) -> bool:
        with use_backend(name):
            try:
                select(torch.device("cpu"))
            except ValueError:
                return False
        return True

    return tuple(name for name in go.available_backends() if runs(name))


BACKENDS = backends_for_cpu_tensors()
