"""Build wheels for chosen pairs of device and torch, each in an environment of its own.

    python scripts/build_wheels.py cpu:2.13.0 cu130:2.14.1
    python scripts/build_wheels.py --matrix

A cell builds from the source distribution, with compilers and a torch of the package index, in a
throw-away environment; torch is not imported there, so the libraries it loads are not installed.
Ends with a table of what was built, and the reason of every cell that cannot be had.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import toolchain

ROOT = Path(__file__).resolve().parents[1]
DEVICES = ("cpu", "cu128", "cu130")
TORCHES = ("2.9.1", "2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
TOOLS = ("setuptools>=77", "wheel", "pybind11>=2.13", "cmake>=3.25", "ninja>=1.11", "packaging")
INSPECTORS = ("auditwheel", "nvidia-cuda-cuobjdump")
COMPILER = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl")


class NotToBeHad(Exception):  # noqa: N818  (an outcome, not a failure)
    """A cell that this machine and the package index cannot build, and why."""


class BuildError(RuntimeError):
    """A wheel was built and is not what it says."""


@dataclass(frozen=True)
class Cell:
    device: str  # cpu, cu130
    torch: str  # 2.14.1

    @classmethod
    def parse(cls, text: str) -> Cell:
        match = re.fullmatch(r"(cpu|cu\d{3}):(\d+\.\d+\.\d+)", text)
        if match is None:
            raise argparse.ArgumentTypeError(
                f"{text!r}: a cell is such as cpu:2.13.0, cu130:2.14.1"
            )
        return cls(*match.groups())

    @property
    def cuda(self) -> str | None:
        """The CUDA version of the device: ``13.0`` for ``cu130``; None for ``cpu``."""
        return None if self.device == "cpu" else f"{self.device[2:4]}.{self.device[4:]}"

    def __str__(self) -> str:
        return f"{self.device}:{self.torch}"


@dataclass(frozen=True)
class Row:
    """What the table says of a cell."""

    cell: Cell
    file: str = "not to be had"
    size: str = ""
    inside: str = ""
    glibc: str = ""
    seconds: str = ""
    reason: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cells", nargs="*", type=Cell.parse, metavar="DEVICE:TORCH")
    parser.add_argument("--matrix", action="store_true", help="every device with every torch")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the wheels")
    options = parser.parse_args()
    cells = options.cells or [Cell(d, t) for d in DEVICES for t in TORCHES if options.matrix]
    if not cells:
        parser.error("no cells: name some, such as cpu:2.13.0, or --matrix")
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for cell in cells:
        print(f"== {cell}", file=sys.stderr, flush=True)
        try:
            rows.append(build(cell, options.out.resolve()))
        except NotToBeHad as reason:
            rows.append(Row(cell, reason=str(reason)))
        except (subprocess.CalledProcessError, BuildError) as error:
            rows.append(Row(cell, file="FAILED", reason=str(error)))
            print(getattr(error, "output", error), file=sys.stderr)
    print(table(rows))
    return 1 if any(row.file == "FAILED" for row in rows) else 0


def build(cell: Cell, out: Path) -> Row:
    """Builds a wheel into ``out`` and inspects it."""
    check_torch(cell)
    packages = compiler_packages(cell)
    with tempfile.TemporaryDirectory(prefix="guard-ops-wheel-") as temporary:
        folder = Path(temporary)
        python = environment(folder / "env", cell, packages)
        source = unpacked_sdist(folder, python)
        environ = {name: v for name, v in os.environ.items() if not name.startswith("PYTHON")}
        environ["PATH"] = f"{python.parent}{os.pathsep}{environ['PATH']}"
        environ["GUARD_OPS_CUDA"] = cell.cuda or "cpu"
        start = time.monotonic()
        options = ["--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir"]
        run(
            *(python, "-m", "pip", "wheel", *options, "-w", folder / "wheel", source),
            environ=environ,
        )
        seconds = time.monotonic() - start
        (wheel,) = (folder / "wheel").glob("*.whl")
        look = run(python, source / "scripts" / "inspect_wheel.py", wheel).splitlines()[-1]
        _, contents = look.split(": ")
        size, inside, glibc = contents.split(", ")
        if cell.cuda and inside == "no CUDA":
            raise BuildError(f"{wheel.name} was built for {cell} and has no device code")
        shutil.copy2(wheel, out)
        return Row(cell, wheel.name, size, inside, glibc, f"{seconds:.0f} s")


def check_torch(cell: Cell) -> None:
    """Checks that the index's build of that torch has that CUDA, from its metadata alone.

    Raises:
        NotToBeHad: it has another CUDA, or there is no such torch.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        options = ["--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", report]
        try:
            run(sys.executable, "-m", "pip", "install", *options, f"torch=={cell.torch}")
        except subprocess.CalledProcessError as error:
            raise NotToBeHad(f"no torch {cell.torch} for this Python in the index") from error
        (found,) = json.loads(report.read_text())["install"]
    if cell.cuda is None:
        return
    # torch requires "cuda-toolkit[...]==13.0.3; ...", and earlier versions of it
    # "nvidia-cuda-runtime-cu12==12.8.90; ..."
    pattern = re.compile(r"(?:cuda-toolkit|nvidia-cuda-runtime).*==\s*(\d+\.\d+)")
    matches = map(pattern.match, found["metadata"].get("requires_dist", []))
    cuda = next((match[1] for match in matches if match), None)
    if cuda != cell.cuda:
        version = found["metadata"]["version"]
        built = f"built with CUDA {cuda}" if cuda else "built without CUDA"
        raise NotToBeHad(f"torch {version} of the index is {built}")


def compiler_packages(cell: Cell) -> list[str]:
    """The packages that give an nvcc of the cell's CUDA; none if this machine has it.

    Raises:
        NotToBeHad: neither this machine nor the index has that compiler.
    """
    if cell.cuda is None:
        return []
    # The runtime library that the extension is linked to, with its headers: the one torch uses.
    packages = [f"nvidia-cuda-runtime{'' if cell.cuda >= '13' else '-cu12'}=={cell.cuda}.*"]
    here = list(toolchain.find_nvcc(os.environ))
    if any(nvcc.version == cell.cuda for nvcc in here):
        return packages
    if int(cell.cuda.split(".")[0]) < 13:
        found = ", ".join(map(str, here)) or "none"
        raise NotToBeHad(
            f"no nvcc {cell.cuda}: not on this machine (found: {found}), and the index's "
            "nvidia-cuda-nvcc-cu12 has ptxas and libnvvm but no nvcc, cudafe++, cicc, fatbinary; "
            "set CUDA_HOME to that toolkit"
        )
    return packages + [f"{name}=={cell.cuda}.*" for name in COMPILER]


def environment(folder: Path, cell: Cell, packages: list[str]) -> Path:
    """The Python of a new environment with the cell's torch, compilers and inspectors."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet"]
    run(*pip, *TOOLS, *INSPECTORS)
    run(*pip, "--no-deps", f"torch=={cell.torch}", *packages)
    return python


def unpacked_sdist(folder: Path, python: Path) -> Path:
    """The source distribution, unpacked, because a wheel must build from what is published."""
    program = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(python, "-c", program, folder=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder / "source")
    (source,) = (folder / "source").iterdir()
    return source


def run(*command: object, folder: Path | None = None, environ: dict[str, str] | None = None) -> str:
    """What ``command`` printed.

    Raises:
        subprocess.CalledProcessError: the command failed; the error has what it printed.
    """
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",  # compilers quote source files in whatever encoding these have
        check=True,
    )
    return done.stdout


def table(rows: list[Row]) -> str:
    """The rows as a table in Markdown, with the reasons below."""
    head = ("cell", "file", "size", "architectures", "glibc", "build time")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for r in rows:
        cells = (str(r.cell), r.file, r.size, r.inside, r.glibc, r.seconds)
        lines.append(f"| {' | '.join(cells)} |")
    reasons = [f"- {row.cell}: {row.reason}" for row in rows if row.reason]
    return "\n".join([*lines, "", *reasons]).rstrip()


if __name__ == "__main__":
    sys.exit(main())
