"""Launching: operands as the kernels take them, counters, and launch configurations."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

from ..transitions import Transitions
from .summation import halve
from .transition import Operands

INTERPRETED = isinstance(halve, InterpretedFunction)  # TRITON_INTERPRET=1 at import

# Warps of a program that holds one tile of 4096 elements: 16 elements a thread, so that a 16-bit
# operand is two 16-byte loads, a float32 one four, all in flight at once.
WARPS = {"sums": 8, "gradient": 8, "sde_step": 8, "rows": 8, "grid": 8}
CANDIDATES = (4, 8, 16)  # what GUARD_OPS_AUTOTUNE=1 searches, for kernels without a barrier
_tuned: dict[tuple[object, ...], int] = {}


# Arguments that a kernel is not compiled anew for: by default Triton would for a 1, and for a
# multiple of 16. `numel` and the latents' strides stay out: 16-byte loads follow from them.
COUNTS = [
    "steps", "batch", "segments", "tiles", "table_c", "table_k", "table_i", "advantages_k",
    "advantages_i", "old_k", "old_i", "weights_k", "weights_i",
]  # fmt: skip
# Pointers to numbers that are read one by one: a slice of them may begin anywhere.
POINTERS = [
    "table", "partial", "sums", "counter", "counters", "c", "written", "factor", "advantages",
    "old_log_prob", "step_weights", "mean_std",
]  # fmt: skip


def strides_of(x: Tensor | None) -> tuple[int, int]:
    """Over K and B; 0 over a single one, so that one step is compiled for like several."""
    if x is None:
        return 0, 0
    return (x.stride(0) if x.shape[0] > 1 else 0), (x.stride(1) if x.shape[1] > 1 else 0)


def pack(*tensors: Tensor | None) -> tuple[Operands, Operands]:
    """Pointers and strides of operands in the order of ``Transitions``."""
    *latents, seed = tensors
    if seed is not None and seed.stride(2) != 1:  # a transition's two numbers beside each other
        seed = seed.contiguous()
    packed = Operands._make([*latents, seed])
    return packed, Operands._make(map(strides_of, packed))


def arguments(t: Transitions) -> tuple[Any, ...]:
    """What every kernel over a loss's transitions begins with."""
    table = t.coefficients
    steps, batch, numel = t.model_output.shape
    return (*pack(*t[:9]), table, *table.stride(), t.guidance_scale, numel, steps, batch)


def compute_type(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes ``device`` the one that kernels are launched on."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    if device.type == "xpu":
        return torch.xpu.device(device)
    return contextlib.nullcontext()


@functools.cache
def nvidia() -> bool:
    return not INTERPRETED and driver.active.get_current_target().backend == "cuda"


def start(
    kernel: Any, grid: int, *args: Any, warps: int, programs: int = 2, **options: Any
) -> None:
    """Launch ``grid`` programs; what is to be fused is written so, hence no fusion of others.

    programs: how many share a processor's 65,536 registers. Left to itself, NVIDIA's assembler
    aims at more of them and spills.
    """
    if nvidia():
        options["maxnreg"] = min(255, 65536 // (32 * warps * programs))
    kernel[(grid,)](*args, num_warps=warps, enable_fp_fusion=False, **options)


def capturing() -> bool:
    """Whether a CUDA graph is; of a torch without CUDA it cannot be asked."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def start_tuned(
    name: str, key: tuple[object, ...], launch: Callable[[int], None], search: bool = True
) -> None:
    """``launch(warps)`` with the table's number of warps, or under GUARD_OPS_AUTOTUNE=1 the best.

    ``launch`` must be repeatable; no number of warps changes a bit of the result. The search is
    made once per key, where ``search``, never while a graph is captured. Without it nothing stalls
    a training step.
    """
    if INTERPRETED or os.environ.get("GUARD_OPS_AUTOTUNE") != "1":
        launch(WARPS[name])
        return
    best = _tuned.get((name, *key))
    if best is None and search and not capturing():
        best = min(CANDIDATES, key=lambda warps: _milliseconds(launch, warps))
        _tuned[(name, *key)] = best
    launch(best or WARPS[name])


def _milliseconds(launch: Callable[[int], None], warps: int) -> float:
    """Median device time of a launch."""
    from triton.testing import do_bench

    return float(do_bench(lambda: launch(warps), warmup=5, rep=20, return_mode="median"))


# ---- counters -----------------------------------------------------------------------------------
# A kernel leaves its counters at 0, so they are zeroed once and not per call, which would be one
# more launch. Calls on one stream follow each other and share; a captured graph may be replayed
# beside anything, so its calls get counters that nobody else ever gets. All are slices of one
# reserve a device, which is made before anything is captured, or traced to be: torch.compile's CUDA
# graphs let nothing that is first allocated inside them live on.

RESERVED = 1 << 18  # int32, 1 MB
LEAST = 1024  # counters of a stream
LINE = 32  # of a cache's line: no two share one, and all begin where the first did
_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_reserved: dict[torch.device, Tensor] = {}
_filled: dict[torch.device, torch.cuda.Event] = {}
_lock = threading.RLock()  # over all of these


def prepare(device: torch.device) -> None:
    """Make the device's reserve, if it has none; for calls that may be the first, traced ones too.

    Under tracing the caller is a fake implementation, whose tensors are none: this one is.
    """
    if device.type != "cuda" or device in _reserved or torch.cuda.is_current_stream_capturing():
        return
    with _lock, no_dispatch(), torch.cuda.device(device):
        # asked again, now of this device's stream
        if device not in _reserved and not torch.cuda.is_current_stream_capturing():
            reserve = torch.zeros(RESERVED, dtype=torch.int32, device=device)
            _filled[device] = torch.cuda.Event()
            _filled[device].record()
            _reserved[device] = reserve


def counters(device: torch.device, count: int) -> Tensor:
    """int32 [>= count] of zeros that nothing else uses at the same time."""
    if device.type != "cuda":
        return _stream_counters(device, count)
    if torch.cuda.is_current_stream_capturing():
        taken = _take(device, count)
        if taken is None:  # the graph zeroes them itself: one more node
            return torch.zeros(count, dtype=torch.int32, device=device)
        return taken
    prepare(device)
    return _stream_counters(device, count)


def _stream_counters(device: torch.device, count: int) -> Tensor:
    with _lock:
        return _locked_stream_counters(device, count)


def _locked_stream_counters(device: torch.device, count: int) -> Tensor:
    stream = 0 if device.type == "cpu" else torch.accelerator.current_stream(device).stream_id
    found = _of_stream.get((device, stream))
    if found is None or found.numel() < count:
        size = max(LEAST, 1 << (count - 1).bit_length())
        found = _take(device, size) if device.type == "cuda" else None
        if found is None:
            found = torch.zeros(size, dtype=torch.int32, device=device)
        else:
            torch.cuda.current_stream(device).wait_event(_filled[device])
        _of_stream[device, stream] = found
    return found


def _take(device: torch.device, count: int) -> Tensor | None:
    """A slice of the device's reserve that is nobody else's; None where too little is left."""
    whole = LINE * -(-count // LINE)
    with _lock:
        left = _reserved.get(device)
        if left is None or left.numel() < whole:
            return None
        _reserved[device] = left[whole:]
        return left[:whole]
