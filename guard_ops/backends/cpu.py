"""The C++ kernels for CPU tensors (``csrc/cpu``), through their registered operators."""

from __future__ import annotations

import os
import sys
import warnings

import torch

from .. import extension
from .compiled import (
    FUSED,
    build_info,
    evaluate,
    gradient,
    guard_loss,
    ratio_statistics,
    scaled,
    sde_step,
    sums,
)

__all__ = [
    "FUSED",
    "NAME",
    "evaluate",
    "gradient",
    "guard_loss",
    "ratio_statistics",
    "scaled",
    "sde_step",
    "sums",
    "supports",
]

NAME = "cpu"

_isa = os.environ.get("GUARD_OPS_CPU_ISA")
if _isa and _isa != build_info()["cpu_isa"]:
    warnings.warn(
        f"guard_ops: GUARD_OPS_CPU_ISA is {_isa!r}, which this build or processor does not have "
        f"({build_info()['cpu_isa_built']}); using {build_info()['cpu_isa']}",
        RuntimeWarning,
        stacklevel=2,
    )
if _keep := os.environ.get("GUARD_OPS_CPU_CACHE_MB"):
    if _keep.isdecimal():
        extension.load().keep_buffers(min(int(_keep) * 2**20, sys.maxsize))
    else:
        warnings.warn(
            f"guard_ops: GUARD_OPS_CPU_CACHE_MB is {_keep!r}; it needs a whole number; keeping 256",
            RuntimeWarning,
            stacklevel=2,
        )


def release_memory() -> int:
    """Give back to the system the memory that is kept of freed results; returns its bytes.

    The memory of a freed gradient or sample of 128 KiB or more is kept for the next result of that
    size, because filling new pages takes longer than the kernels do. At most the latest eight are
    kept, of 256 MiB together (``GUARD_OPS_CPU_CACHE_MB`` sets another limit, 0 keeps nothing).
    """
    count: int = extension.load().release_buffers()
    return count


def supports(device: torch.device) -> bool:
    return device.type == "cpu"
