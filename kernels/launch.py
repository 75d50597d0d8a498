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
from triton.runtime.jit import JITFunction

from ..transitions import Transitions
from .summation import halve
from .transition import Operands

# Under TRITON_INTERPRET=1 at import. The interpreter's own class is not asked for, because its
# module needs numpy, which Triton and torch run without.
INTERPRETED = not isinstance(halve, JITFunction)

# A program holds one tile of 4096 elements. With 8 warps a thread has 16 of them: two 16-byte loads
# of a 16-bit operand, four of a float32 one, all in flight at once.
WARPS = {"sums": 8, "gradient": 8, "sde_step": 8, "rows": 8, "grid": 8, "given_sums": 8}
CANDIDATES = (4, 8, 16)  # warps that GUARD_OPS_AUTOTUNE=1 tries, for kernels without a barrier
_tuned: dict[tuple[object, ...], int] = {}


# Arguments for whose values no kernel is compiled; by default Triton compiles anew for a 1, and for
# a multiple of 16. `numel` and the latents' strides are left out, because 16-byte loads follow from
# their being multiples of 16.
COUNTS = [
    "steps", "batch", "segments", "tiles", "table_c", "table_k", "table_i", "advantages_k",
    "advantages_i", "old_k", "old_i", "weights_k", "weights_i",
    "elements_k", "elements_i",
]  # fmt: skip
# Pointers for whose alignment no kernel is compiled: their numbers are read one by one, and a slice
# of them may begin anywhere.
POINTERS = [
    "table", "partial", "sums", "counter", "counters", "c", "written", "factor", "advantages",
    "old_log_prob", "step_weights", "elements", "statistics",
]  # fmt: skip


def strides_of(x: Tensor | None) -> tuple[int, int]:
    """Strides over K and B; 0 where the size is 1, so that one step and several compile alike."""
    if x is None:
        return 0, 0
    return (x.stride(0) if x.shape[0] > 1 else 0), (x.stride(1) if x.shape[1] > 1 else 0)


def pack(operands: Any) -> tuple[Any, Any]:
    """``Operands`` as pointers, and as strides."""
    seed = operands.seed
    if seed is not None and seed.stride(2) != 1:  # kernels read a transition's two side by side
        operands = operands._replace(seed=seed.contiguous())
    if seed is not None and seed.shape[2] == 3:
        operands = operands._replace(counter=seed[..., 2])
    return operands, Operands._make(map(strides_of, operands))


def arguments(t: Transitions) -> tuple[Any, ...]:
    """The arguments with which every kernel over a loss's transitions begins."""
    table = t.coefficients
    steps, batch, numel = t.latents.model_output.shape
    return (
        *pack(Operands(*t.latents, t.seed, None)),
        table,
        *table.stride(),
        t.guidance_scale,
        numel,
        steps,
        batch,
    )


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
    """Launch ``grid`` programs, without floating-point fusion other than the kernels' ``tl.fma``.

    programs: how many are to share a processor's 65,536 registers. Left to itself, NVIDIA's
    assembler aims at more programs and spills registers.
    """
    if nvidia():
        options["maxnreg"] = min(255, 65536 // (32 * warps * programs))
    kernel[(grid,)](*args, num_warps=warps, enable_fp_fusion=False, **options)


def capturing() -> bool:
    """Whether a CUDA graph is being captured, which a torch without CUDA cannot be asked."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def start_tuned(
    name: str, key: tuple[object, ...], launch: Callable[[int], None], search: bool = True
) -> None:
    """``launch(warps)`` with the number in ``WARPS``, or under GUARD_OPS_AUTOTUNE=1 the fastest.

    The search launches repeatedly, so ``launch`` must be repeatable; no number of warps changes a
    bit of the result. It is made once per key, if ``search``, and never while a graph is captured.
    It has to be asked for, because it stalls a training step.
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
# A kernel leaves its counters at 0, so they are zeroed once, and not in every call by one more
# launch. Calls on one stream follow each other and share counters. A captured graph may be replayed
# beside anything, so its calls get counters that nothing else gets. All are slices of one reserve
# per device, which is made before anything is captured or traced: what is first allocated inside
# one of torch.compile's CUDA graphs does not live on.

RESERVED = 1 << 18  # int32, 1 MB
LEAST = 1024  # the fewest counters that a stream gets
LINE = 32  # counters in a cache line; a slice has whole lines, so that no two slices share one
_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_reserved: dict[torch.device, Tensor] = {}
_filled: dict[torch.device, torch.cuda.Event] = {}
_lock = threading.RLock()  # held to change any of the three


def prepare(device: torch.device) -> None:
    """Make the device's reserve, if it has none; every call that may be the first calls this.

    Under tracing that is a fake implementation, whose tensors have no memory. The reserve has some,
    because it is made under ``no_dispatch``.
    """
    if device.type != "cuda" or device in _reserved or torch.cuda.is_current_stream_capturing():
        return
    with _lock, no_dispatch(), torch.cuda.device(device):
        # asked again, as the current stream is now one of this device
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
        if taken is None:  # counters outside the reserve are zeroed by one more node of the graph
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
