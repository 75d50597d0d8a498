"""Compile every Triton kernel for NVIDIA's architectures without a GPU, and read the machine code.

    python scripts/kernel_table.py           # write docs/kernels.md
    python scripts/kernel_table.py --check   # fail where a bound is broken or the table is not this

The launchers of ``kernels/`` are called as they are, on CPU tensors, under a driver that has no
device: what is compiled is what a GPU would run.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "kernels.md"
OTHERS = "\n## The CUDA kernels' instructions\n"  # what follows is scripts/kernel_counts.py's
ARCHITECTURES = (80, 90, 100, 120)
DTYPES = (torch.float32, torch.bfloat16)
# The most registers that a thread may take. A program has 256 threads, so a processor runs two with
# up to 128 registers, else one. grid_kernel may take more: it holds its tile across the [K, B]
# arithmetic, and has a processor to itself. So have the kernels that are one program.
REGISTERS = {
    "sums_kernel": 128,
    "gradient_kernel": 128,
    "sde_step_kernel": 128,
    "sums_then_evaluate_kernel": 128,
    "rows_kernel": 128,
    "grid_kernel": 255,
    "evaluate_kernel": 255,
    "ratio_statistics_kernel": 255,
}
ONE_PROGRAM = ("evaluate_kernel", "ratio_statistics_kernel")  # which read no latent


class Facts(NamedTuple):
    """What the machine code of a kernel shows."""

    arch: int
    kernel: str
    form: str
    dtype: str
    registers: int
    spills: int  # instructions that read or write local memory
    shared: int  # bytes
    instructions: int
    loads: int  # of 128 bits, from global memory
    stores: int  # of 128 bits, to global memory

    def broken(self) -> list[str]:
        """What is wrong with the kernel."""
        name = f"{self.kernel} ({self.form}, {self.dtype}, sm_{self.arch})"
        bound = REGISTERS[self.kernel]
        out = []
        if self.spills:
            out.append(f"{name} has {self.spills} spill instructions")
        if self.registers > bound:
            out.append(f"{name} needs {self.registers} registers, more than {bound}")
        if self.kernel in ONE_PROGRAM:
            return out
        if self.loads == 0:
            out.append(f"{name} has no 128-bit global load")
        if self.stores == 0 and self.kernel not in ("sums_kernel", "sums_then_evaluate_kernel"):
            out.append(f"{name} has no 128-bit global store")
        return out


class NoDevice:
    """A Triton driver for a GPU that is not there, with which Triton compiles but cannot launch."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def compiled(arch: int, calls: list[Callable[[], None]]) -> list[Any]:
    """The kernels that ``calls`` would launch."""
    from triton.runtime import JITFunction, driver

    driver.set_active(NoDevice(arch))
    out: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, **options: Any) -> None:
        options["warmup"] = True
        out.append(run(self, *args, **options))

    JITFunction.run = compile_only
    try:
        for call in calls:
            call()
    finally:
        JITFunction.run = run
    return out


def calls_of(form: str, dtype: torch.dtype) -> list[Callable[[], None]]:
    """Calls of every launcher, on a problem of ``form``: two steps of four latents of two tiles."""
    from guard_ops import GuardConfig
    from guard_ops.config import objective_of
    from guard_ops.kernels import given_sums, gradient, guard_loss, paths, sde_step, sums
    from guard_ops.transitions import Latents, Rows, Transitions

    guard_loss.machine = lambda device: paths.Machine(132, 50 << 20, True)  # an H100's
    shape = (2, 4, 8192)

    def latents(of: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=of)

    def rows(n: int, of: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.zeros(n, 2, 4, dtype=of)

    seeds = torch.zeros(2, 4, 2, dtype=torch.int64)
    mean = form == "mean"
    x, y, m = latents(), latents(), latents(torch.float32)
    of = {"sample": x, "prev_sample": y, "old_mean": m} if mean else {"old_model_output": x}
    absent: dict[str, None] = dict.fromkeys(Latents._fields)
    table = torch.ones(5, 2, 1, dtype=torch.float64).expand(5, 2, 4)
    t = Transitions(
        Latents(**{**absent, "model_output": latents(), **of}), None if mean else seeds, table, 1.0
    )

    def fused(path: str, config: GuardConfig) -> None:
        os.environ["GUARD_OPS_TRITON_PATH"] = path
        loss, metrics = torch.zeros(()), torch.zeros(11, 2)
        per_row = rows(4, torch.float32)
        numbers = Rows(rows(1)[0], None, None, None, None)
        results = loss, per_row, metrics, rows(3)
        guard_loss.guard_loss(t, numbers, objective_of(config, True), latents(), None, *results)

    def step() -> None:
        of_step = Latents(**{**absent, "model_output": x, "sample": y})
        t = Transitions(of_step, seeds, table, 1.0)
        sde_step.sde_step(t, latents(), latents(torch.float32))

    def one_program(launch: Callable[..., None], *out: torch.Tensor) -> None:
        numbers = Rows(rows(1)[0], None, None, None, None)
        launch(rows(3), t, numbers, objective_of(GuardConfig.article(), True), *out)

    results = torch.zeros(()), rows(4, torch.float32), torch.zeros(11, 2), rows(3)
    alone = [  # the same for every form and dtype but float64
        lambda: one_program(given_sums.evaluate_sums, *results),
        lambda: one_program(given_sums.ratio_statistics, torch.zeros(5, 2, dtype=torch.float64)),
    ]
    return [
        lambda: sums.sums(t, rows(3)),
        lambda: gradient.gradient(t, rows(3), latents(), None),
        lambda: fused("two_launches", GuardConfig.article()),
        lambda: fused("one_launch", GuardConfig.article()),
        lambda: fused("rows", GuardConfig.paper()),
        *([] if mean else [step]),
        *(alone if mean and dtype == torch.float32 else []),
    ]


def facts_of(arch: int, form: str, dtype: torch.dtype) -> list[Facts]:
    """The facts of every kernel, as cuobjdump shows them."""
    found: dict[str, Facts] = {}
    for kernel in compiled(arch, calls_of(form, dtype)):
        name = kernel.metadata.name
        if name in found:
            continue
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = _cuobjdump("--dump-resource-usage", file.name)
            code = _cuobjdump("--dump-sass", file.name)
        (registers,) = re.findall(r"REG:(\d+)", usage)
        lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*)$", code, re.MULTILINE)

        def count(pattern: str, lines: list[str] = lines) -> int:
            return sum(re.search(pattern, line) is not None for line in lines)

        found[name] = Facts(
            arch,
            name,
            form,
            str(dtype).removeprefix("torch."),
            int(registers),
            count(r"\b(LDL|STL)\b"),
            kernel.metadata.shared,
            len(lines),
            count(r"\bLDG\.\S*128"),
            count(r"\bSTG\.\S*128"),
        )
    return list(found.values())


def _cuobjdump(*arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def all_facts(processes: int = 2) -> list[Facts]:
    """The facts of every kernel in every form and dtype for every architecture."""
    cases = [(a, f, d) for a in ARCHITECTURES for f in ("mean", "seeded") for d in DTYPES]
    with ProcessPoolExecutor(processes) as pool:
        results = pool.map(facts_of, *zip(*cases, strict=True))
        return [fact for result in results for fact in result]


def page(facts: list[Facts]) -> str:
    """The text of docs/kernels.md."""
    import triton

    head = ("kernel", "form", "dtype", "sm", "registers", "spills", "shared", "instructions",
            "128-bit loads", "128-bit stores")  # fmt: skip
    bounds = ", ".join(f"`{name}` {registers}" for name, registers in REGISTERS.items())
    lines = [
        "# The Triton kernels' machine code",
        "",
        "Written by `python scripts/kernel_table.py`, which compiles every kernel for every "
        "architecture without a GPU and reads",
        "the code with `cuobjdump`; `make test-all` checks it. Nothing here says how fast they "
        "are: [GPU](gpu.md).",
        "",
        f"Triton {triton.__version__}, 8 warps a program, latents of a multiple of 16 elements at "
        "16-byte addresses, `old_mean` float32.",
        "Registers are a thread's, shared memory a program's, in bytes. "
        "None of these spills; registers are at most",
        f"{bounds}.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * 4 + "---:|" * 6,
    ]
    order = sorted(facts, key=lambda f: (list(REGISTERS).index(f.kernel), f.form, f.dtype, f.arch))
    for f in order:
        cells = (f"`{f.kernel}`", f.form, f.dtype, f.arch, *f[4:])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


@functools.cache
def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def main() -> int:
    """Write the page, or check it; returns 0 if every bound holds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    if _interpreting():
        print("TRITON_INTERPRET is set: nothing would be compiled", file=sys.stderr)
        return 2
    facts = all_facts()
    problems = [problem for fact in facts for problem in fact.broken()]
    saved = PAGE.read_text() if PAGE.exists() else ""
    text = page(facts) + "".join(saved.partition(OTHERS)[1:])
    if not check:
        PAGE.write_text(text)
    elif not PAGE.exists():
        problems.append("docs/kernels.md is missing")
    else:
        import triton

        if f"Triton {triton.__version__}," in saved and saved != text:
            problems.append("docs/kernels.md is out of date: python scripts/kernel_table.py")
    print("\n".join(problems) or f"{len(facts)} kernels: no spills, bounds hold")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
