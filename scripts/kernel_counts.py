"""Count the warp instructions of the CUDA kernels per 256 elements, and write them into the docs.

    python scripts/kernel_counts.py           # write the table of docs/kernels.md
    python scripts/kernel_counts.py --check   # fail where a floor is broken or the table is old

The counts are exact and need no GPU: nvcc compiles the kernels, ``cuobjdump`` shows their machine
code, and :mod:`sass` follows one warp through it with the arguments of a real launch, which
``csrc/tests/launches.cpp`` prints.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import compiling  # noqa: E402
import sass  # noqa: E402

PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- begin:counts -->", "<!-- end:counts -->"
ARCHITECTURES = (80, 90, 100, 120)
FORMS = ("mean", "velocity", "noise", "seeded", "log_prob")
DTYPES = ("bfloat16", "float32")
# The file of a kernel, which is called <name>_of_chunks.
KERNELS = {"sums": "sums.cu", "gradient": "guard_loss.cu"}
MODEL = """\
**Predictions, which no GPU has confirmed.** Microseconds that a pass of `two_launches` takes at
least, in the mean form in bfloat16: to issue these instructions without a stall on every
multiprocessor at boost clock, and to move its bytes at the data sheet's bandwidth (all of them, as
if no cache held what the sums have read). The counts of an RTX 4090 are those of sm_80, from whose
intermediate code its own is assembled. The larger bounds the pass; launches and the `[K, B]`
arithmetic come on top."""
# A row's tiles of 256 elements -> tiles of a chunk, chunks of a row
LENGTHS = {8192: (4, 2048), 256: (1, 256)}
ROWS, WARPS = 256, 8

# The most instructions that a warp may issue on sm_90 for 256 elements of a kernel, form and dtype,
# in chunks of four tiles and of one.
FLOORS = {
    ("sums", "mean", "bfloat16"): (180, 250),
    ("gradient", "mean", "bfloat16"): (240, 320),
    ("sums", "seeded", "bfloat16"): (500, 550),
}


class Device(NamedTuple):
    """What a data sheet says of a GPU."""

    name: str
    arch: int
    multiprocessors: int
    gigahertz: float  # boost clock
    terabytes: float  # a second, of memory


# A multiprocessor issues four warp instructions a cycle.
DEVICES = (
    Device("A100 SXM 80 GB", 80, 108, 1.41, 2.04),
    Device("H100 SXM", 90, 132, 1.98, 3.35),
    Device("H200 SXM", 90, 132, 1.98, 4.8),
    Device("B200", 100, 148, 1.97, 8.0),
    Device("RTX 4090", 80, 128, 2.52, 1.01),  # sm_89 is assembled from the code of sm_80
    Device("RTX 5090", 120, 170, 2.41, 1.79),
)
# rows, elements of a row, tiles of a chunk
WORKLOADS = {
    "[16, 16, 21, 60, 104]": (16, 16 * 21 * 60 * 104, 4),
    "[8, 16, 64, 64]": (8, 16 * 64 * 64, 1),
}
BYTES = {"sums": 10, "gradient": 8}  # of an element of the mean form in bfloat16, old mean float32


class Count(NamedTuple):
    """The instructions of one kernel on one architecture, in one form and dtype."""

    kernel: str
    form: str
    dtype: str
    arch: int
    long: float  # per tile, in chunks of four
    short: float  # in chunks of one
    kinds: dict[str, float]  # of `long`

    def broken(self) -> list[str]:
        """What is wrong with the kernel."""
        floors = FLOORS.get((self.kernel, self.form, self.dtype))
        if self.arch != 90 or floors is None:
            return []
        name = f"{self.kernel} ({self.form}, {self.dtype}, sm_{self.arch})"
        got = {4: (self.long, floors[0]), 1: (self.short, floors[1])}
        return [
            f"{name} issues {count:.1f} instructions per 256 elements in chunks of {tiles}, "
            f"more than {floor}"
            for tiles, (count, floor) in got.items()
            if count > floor
        ]


def find_cuobjdump() -> str | None:
    """Beside nvcc, on PATH, or the triton package's."""
    beside = [shutil.which("cuobjdump"), shutil.which("nvcc")]
    folders = [Path(x).resolve().parent for x in beside if x]
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin:
        folders.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    found = (str(folder / "cuobjdump") for folder in folders if (folder / "cuobjdump").exists())
    return next(found, None)


class MachineCode(NamedTuple):
    """A kernel's instructions, and its tables of jumps."""

    instructions: list[sass.Instruction]
    jumps: bytes


def machine_code(kernel: str, arch: int) -> MachineCode:
    """Compile a kernel over chunks for one architecture, and read it."""
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        raise FileNotFoundError(
            "no cuobjdump: neither in nvcc's folder nor from the triton package"
        )
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        nvcc = ["nvcc", f"-arch=sm_{arch}", "-O3", "-fmad=false", "-w"]
        source = ROOT / "csrc" / "cuda" / KERNELS[kernel]
        subprocess.run([*nvcc, "-std=c++17", "-ptx", "-o", ptx, source], check=True)
        # only this one of the file's kernels is assembled, which takes most of the time
        (name,) = re.findall(rf"\.entry (\w*{kernel}_of_chunks\w*)", ptx.read_text())
        subprocess.run([*nvcc, "-cubin", "-Xptxas", f"-e,{name}", "-o", cubin, ptx], check=True)
        return read_machine_code(kernel, cubin, cuobjdump)


def read_machine_code(kernel: str, cubin: Path, cuobjdump: str) -> MachineCode:
    """The kernel over chunks in a file for one architecture."""

    def dump(how: str) -> str:
        command = [cuobjdump, how, str(cubin)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    kernels = sass.parse(dump("-sass"))
    (name,) = (name for name in kernels if f"{kernel}_of_chunks" in name)
    return MachineCode(kernels[name], sass.jump_tables(dump("-elf")).get(name, b""))


@functools.cache
def launches() -> Path:
    """The program that prints what kernels are launched with."""
    return (
        compiling.build({"GUARD_OPS_TESTS": "ON"}, "launches", "cpp_tests") / "csrc/tests/launches"
    )


@functools.cache
def arguments(form: str, dtype: str, tiles: int) -> dict[str, bytes]:
    """Kernel -> its argument, for rows of so many tiles whose old mean is float32."""
    command = [launches(), form, dtype, "float32", str(256 * tiles)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: bytes.fromhex(data) for name, data in map(str.split, text.splitlines())}


def per_tile(
    code: MachineCode, argument: bytes, arch: int, chunk_tiles: int, row_chunks: int
) -> dict[str, float]:
    """Kind -> instructions of a warp for a tile: those of eight chunks less those of four."""
    kinds: Counter[str] = Counter()
    for sign, chunks in ((1, 8), (-1, 4)):
        blocks = ROWS * row_chunks // (WARPS * chunks)
        launch = sass.Launch(argument, blocks, 32 * WARPS, code.jumps)
        for kind, n in sass.walk(code.instructions, launch, arch, block=3).kinds().items():
            kinds[kind] += sign * n
    return {kind: kinds[kind] / (4 * chunk_tiles) for kind in sass.KINDS}


def count(code: MachineCode, kernel: str, form: str, dtype: str, arch: int) -> Count:
    """Follow a kernel's machine code in one form and dtype."""
    totals = []
    for tiles, (chunk_tiles, row_chunks) in LENGTHS.items():
        argument = arguments(form, dtype, tiles)[f"{kernel}_of_chunks"]
        totals.append(per_tile(code, argument, arch, chunk_tiles, row_chunks))
    long, short = (sum(kinds.values()) for kinds in totals)
    return Count(kernel, form, dtype, arch, long, short, totals[0])


def all_counts() -> list[Count]:
    """Of every kernel, form and dtype on every architecture."""
    out = []
    for arch in ARCHITECTURES:
        for kernel in KERNELS:
            code = machine_code(kernel, arch)
            out += [count(code, kernel, f, d, arch) for f in FORMS for d in DTYPES]
    return out


def in_order(counts: list[Count]) -> list[Count]:
    """As the tables have them."""
    kernels = list(KERNELS)
    return sorted(counts, key=lambda c: (kernels.index(c.kernel), FORMS.index(c.form), c.dtype))


def table(counts: list[Count]) -> str:
    """The part of docs/kernels.md between the two marks."""
    release = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True)
    (version,) = re.findall(r"release ([0-9.]+)", release.stdout)
    lines = [
        f"Written by `python scripts/kernel_counts.py` with nvcc {version}. The kinds are those of "
        "chunks of 4.",
        "",
        "| kernel | form | dtype | sm | chunks of 4 | of 1 | " + " | ".join(sass.KINDS) + " |",
        "|---|---|---|---|---:|---:|" + "---:|" * len(sass.KINDS),
    ]
    for c in in_order(counts):
        numbers = (c.long, c.short, *(c.kinds[kind] for kind in sass.KINDS))
        cells = (c.kernel, c.form, c.dtype, c.arch, *(f"{n:.0f}" for n in numbers))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def predictions(counts: list[Count]) -> str:
    """The microseconds that each pass takes at least, by what it issues and by what it moves."""
    lines = [
        "| device | latents | pass | issue | memory |",
        "|---|---|---|---:|---:|",
    ]
    of = {(c.kernel, c.arch): c for c in counts if (c.form, c.dtype) == ("mean", "bfloat16")}
    for device in DEVICES:
        for latents, (rows, numel, chunk_tiles) in WORKLOADS.items():
            for kernel in KERNELS:
                c = of[kernel, device.arch]
                warps = (c.long if chunk_tiles == 4 else c.short) * rows * numel / 256
                issue = warps / (device.multiprocessors * 4 * device.gigahertz * 1e3)
                memory = BYTES[kernel] * rows * numel / (device.terabytes * 1e6)
                cells = (device.name, latents, kernel, f"{issue:.1f}", f"{memory:.1f}")
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


BESIDE = """\
The Triton kernels beside them, followed in the same way (`scripts/triton_counts.py`): what a warp
issues for 256 elements of a segment of four tiles in the sums, and of a tile in the gradient, with
all that their program does once, as each is a program of its own. A CUDA warp goes from chunk to
chunk, so what it does once is not there to be counted. On sm_100 both work with two float32 numbers
at once where they can."""


def beside_triton(counts: list[Count]) -> str:
    """Both backends' counts, of the kernels, forms and dtypes of both."""
    import triton
    import triton_counts

    lines = [
        BESIDE,
        "",
        f"| kernel | form | dtype | sm | CUDA | Triton {triton.__version__} |",
        "|---|---|---|---|---:|---:|",
    ]
    for c in counts:
        if c.form in triton_counts.FORMS:
            theirs = triton_counts.count(c.kernel, c.form, c.dtype, c.arch)
            cells = (c.kernel, c.form, c.dtype, c.arch, f"{c.long:.0f}", f"{theirs:.0f}")
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    """Write the table, or check it; returns 0 if every floor holds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    counts = all_counts()
    problems = [problem for c in counts for problem in c.broken()]
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    parts = (table(counts), beside_triton(in_order(counts)), MODEL, predictions(counts))
    tables = "\n\n".join(parts)
    text = f"{before}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}"
    if not check:
        PAGE.write_text(text)
    elif text != page:
        problems.append("docs/kernels.md is out of date: python scripts/kernel_counts.py")
    print("\n".join(problems) or f"{len(counts)} counts: floors hold")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
