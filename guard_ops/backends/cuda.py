"""The CUDA C++ kernels (``csrc/cuda``), through their registered operators.

They take float32, bfloat16 and float16 operands in any mixture. For float64 operands there are the
backends ``triton`` and ``reference``.
"""

from __future__ import annotations

import os
import warnings

import torch

from .. import extension
from .compiled import (
    FUSED,
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

_C = extension.load()
if _C.build_info()["cuda"] is None:
    raise ImportError("this build of guard-ops has no CUDA kernels")
if torch.cuda.device_count() == 0:  # this asks NVML, so that the process may still fork
    raise ImportError("no CUDA device")

NAME = "cuda"

# variable -> what it sets, and what is done where it cannot be
_SETTINGS = {
    "GUARD_OPS_CUDA_PATH": (_C.force_cuda_path, "choosing by size and device"),
    "GUARD_OPS_CUDA_FREE_MULTIPROCESSORS": (
        lambda text: _C.leave_multiprocessors_free(int(text)),
        "leaving none free",
    ),
}
for _name, (_set, _instead) in _SETTINGS.items():
    if _given := os.environ.get(_name):
        try:
            _set(_given)
        except (ValueError, TypeError) as error:
            warnings.warn(f"guard_ops: {_name}: {error}; {_instead}", RuntimeWarning, stacklevel=2)

_unsupported: dict[int, str] = {}  # by device: why it cannot run the kernels, empty if it can


def supports(device: torch.device) -> bool:
    """Whether the build has machine code, or PTX, that this device runs."""
    if device.type != "cuda":
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _unsupported:
        if torch.compiler.is_compiling():  # torch.compile cannot trace the call below
            return True
        _unsupported[index] = _C.cuda_unsupported(index)
    return not _unsupported[index]
