"""The CUDA C++ kernels (``csrc/cuda``), through their registered operators.

float32, bfloat16 and float16 operands in any mixture; float64 is
``triton``'s and ``reference``'s.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import extension
from ..config import GuardConfig
from ..transitions import Transitions, compute_dtype
from . import operators
from .operators import objective_arguments

if TYPE_CHECKING:
    from .._C import PlainCall

_C = extension.load()
if _C.build_info()["cuda"] is None:
    raise ImportError("this build of guard-ops has no CUDA kernels")
if torch.cuda.device_count() == 0:  # by NVML: a process may still fork afterwards
    raise ImportError("no CUDA device")

NAME = "cuda"
FUSED = True

if _path := os.environ.get("GUARD_OPS_CUDA_PATH"):
    try:
        _C.force_cuda_path(_path)
    except ValueError as error:
        warnings.warn(
            f"guard_ops: GUARD_OPS_CUDA_PATH: {error}; choosing by size and device",
            RuntimeWarning,
            stacklevel=2,
        )

_ops = torch.ops.guard_ops


_unsupported: dict[int, str] = {}  # by device; why, or nothing


def supports(device: torch.device) -> bool:
    """Whether the build has machine code, or PTX, that this device runs."""
    if device.type != "cuda":
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _unsupported:
        if torch.compiler.is_compiling():  # it cannot trace the question
            return True
        _unsupported[index] = _C.cuda_unsupported(index)
    return not _unsupported[index]


def _check_dtypes(*tensors: Tensor | None) -> None:
    _check_width(compute_dtype(*(x for x in tensors if x is not None)) == torch.float64)


def _check_width(wide: bool) -> None:
    if wide:
        raise TypeError(
            "the 'cuda' backend has no float64 kernels; convert the latents to float32, or use "
            "guard_ops.use_backend('triton') or 'reference'"
        )


def sums(t: Transitions) -> Tensor:
    """[3, K, B] float64; reads every operand once."""
    _check_dtypes(*t[:8])
    out: Tensor = _ops.sums(*t)
    return out


def gradient(
    t: Transitions, c: Tensor, cond: bool = True, uncond: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """As ``reference.gradient``; reads every operand once."""
    _check_dtypes(*t[:8])
    grad, grad_uncond = _ops.gradient(c, *t, cond, uncond)
    return (grad if cond else None), (grad_uncond if uncond else None)


def sde_step(
    v: Tensor, x: Tensor, coefficients: Tensor, noise: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.sde_step``, in one pass."""
    _check_dtypes(v, x, noise)
    out: tuple[Tensor, Tensor, Tensor] = _ops.sde_step(v, x, coefficients, noise, seed)
    return out


def guard_loss(
    t: Transitions,
    advantages: Tensor,  # [K, B] float64 or float32, like the next two
    old_log_prob: Tensor | None,  # [K, B]
    step_weights: Tensor | None,  # [K, B]
    mean_std: Tensor | None,  # [2, K] float64
    config: GuardConfig,
    gaussian: bool,
    cond: bool,
    uncond: bool,
) -> tuple[Tensor, ...]:
    """Loss and gradient; every operand is read once while the batch, or a row, fits on chip.

    Returns:
        What ``cpu.guard_loss`` does.
    """
    _check_dtypes(*t[:8])
    out: tuple[Tensor, ...] = _ops.guard_loss(
        *t,
        advantages,
        old_log_prob,
        step_weights,
        mean_std,
        *objective_arguments(config, gaussian),
        cond,
        uncond,
    )
    return out


def guard_loss_plain(call: PlainCall, *rest: Any) -> tuple[Tensor, ...]:
    """:func:`guard_loss` of what C++ has checked; ``rest`` from ``mean_std`` on."""
    _check_width(call.wide)
    return operators.guard_loss_plain(call, *rest)


def scaled(
    transitions: Callable[[], Transitions],
    sum_grads: Tensor,  # [3, K, B] float64: d loss / d sums
    grads: list[Tensor],
    factor: Tensor,  # []
    cond: bool,
    uncond: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients of ``factor * loss`` in place of those of ``loss``, each rounded once.

    The host does not wait for ``factor``: where the device finds a 1, the kernel ends at once.
    """
    _ops.scaled_(*grads, factor, sum_grads, *transitions(), cond, uncond)
    return tuple(grads)
