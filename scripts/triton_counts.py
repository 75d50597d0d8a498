"""Count the warp instructions of the Triton kernels as :mod:`kernel_counts` does the CUDA kernels'.

The kernels are compiled as :mod:`kernel_table` does it, without a GPU, and followed by :mod:`sass`
with the arguments of a launch over long rows. A program is a segment of four tiles of a row for the
sums, and a tile for the gradient, so what it does once is counted with them; what only the last
program of a row does is not.
"""

from __future__ import annotations

import functools
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import kernel_table
import sass
import torch
from kernel_counts import MachineCode, find_cuobjdump

FORMS = ("mean", "seeded")
DTYPES = ("bfloat16", "float32")
NUMEL = 1 << 21  # of a row: 128 segments of four tiles
STEPS, BATCH, WARPS = 1, 2, 8


class Compiled(NamedTuple):
    """A kernel with the arguments of its launch."""

    kernel: Any  # of triton
    arguments: Sequence[Any]
    programs: int


def launched(arch: int, call: Callable[[], None]) -> Compiled:
    """The one kernel that ``call`` would launch."""
    from triton.runtime import JITFunction, driver

    driver.set_active(kernel_table.NoDevice(arch))
    found: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, **options: Any) -> None:
        kernel = run(self, *arguments, grid=grid, **{**options, "warmup": True})
        found.append(Compiled(kernel, arguments, grid[0]))

    JITFunction.run = compile_only
    try:
        call()
    finally:
        JITFunction.run = run
    (only,) = found
    return only


def call_of(kernel: str, form: str, dtype: torch.dtype) -> Callable[[], None]:
    """A call that launches the kernel, on long rows that nobody reads."""
    from guard_ops.kernels import gradient, sums
    from guard_ops.transitions import Latents, Transitions

    def latents(of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(STEPS, BATCH, NUMEL, dtype=of)

    def rows(n: int) -> torch.Tensor:
        return torch.empty(n, STEPS, BATCH, dtype=torch.float64)

    seeds = torch.empty(STEPS, BATCH, 2, dtype=torch.int64)
    of: Mapping[str, torch.Tensor] = {"old_model_output": latents()}
    if form == "mean":
        of = {"sample": latents(), "prev_sample": latents(), "old_mean": latents(torch.float32)}
    absent: dict[str, Any] = dict.fromkeys(Latents._fields)
    named = Latents(**{**absent, "model_output": latents(), **of})
    t = Transitions(named, None if form == "mean" else seeds, rows(5), 1.0)
    if kernel == "sums":
        return lambda: sums.sums(t, rows(3))
    return lambda: gradient.gradient(t, rows(3), latents(), None)


def _flat(kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """The parameters of a signature's entry, which may be a group, with their values."""
    if isinstance(kind, tuple):
        for one, of_it in zip(kind, value, strict=True):
            yield from _flat(one, of_it)
    elif kind != "constexpr":
        yield kind, value


_FORMATS = {"i32": "<i", "i64": "<q", "fp32": "<f", "fp64": "<d"}


def parameters(compiled: Compiled) -> bytes:
    """The launch's parameters, each at a multiple of its size; pointers lead nowhere."""
    out, pointers = b"", 0
    signature = compiled.kernel.src.signature.values()
    given = [p for kind, x in zip(signature, compiled.arguments) for p in _flat(kind, x)]  # noqa: B905
    given += [("*", None)] * 2  # Triton's own memory for scratch and for profiles
    for kind, value in given:
        if kind.startswith("*"):
            pointers += 1
            part = struct.pack("<Q", (0x7F00 << 32) + (pointers << 28))
        else:
            part = struct.pack(_FORMATS[kind], value)
        out += bytes(-len(out) % len(part)) + part
    return out


def machine_code(compiled: Compiled) -> MachineCode:
    cuobjdump = find_cuobjdump()
    assert cuobjdump is not None  # the triton package has one
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.kernel.asm["cubin"])

        def dump(how: str) -> str:
            command = [cuobjdump, how, str(cubin)]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        ((name, code),) = sass.parse(dump("-sass")).items()
        return MachineCode(code, sass.jump_tables(dump("-elf")).get(name, b""))


@functools.cache
def count(kernel: str, form: str, dtype: str, arch: int) -> float:
    """A warp's instructions per 256 elements."""
    compiled = launched(arch, call_of(kernel, form, getattr(torch, dtype)))
    code = machine_code(compiled)
    launch = sass.Launch(parameters(compiled), compiled.programs, 32 * WARPS, code.jumps)
    walked = sass.walk(code.instructions, launch, arch, block=3, leaves=True)
    elements = STEPS * BATCH * NUMEL / compiled.programs / WARPS
    return walked.total() / (elements / 256)
