"""What is inside a wheel: its size, the GPU architectures of its kernels, the glibc it needs.

    python scripts/inspect_wheel.py dist/*.whl

It needs ``auditwheel``, and a ``cuobjdump``: that of a CUDA toolkit, of the package
nvidia-cuda-cuobjdump, or of triton.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Contents:
    size: int  # bytes
    architectures: tuple[str, ...]  # sm_90 (machine code), compute_120 (PTX); empty without CUDA
    glibc: str  # the oldest platform whose libraries have every symbol: manylinux_2_34_x86_64


def inspect(wheel: Path, cuobjdump: str) -> Contents:
    """Unpacks ``wheel`` into a temporary folder and reads its extension.

    Raises:
        RuntimeError: the wheel has no extension.
    """
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        extensions = [name for name in archive.namelist() if name.endswith(".so")]
        if len(extensions) != 1:
            raise RuntimeError(f"{wheel.name} has {len(extensions)} extensions; it needs one")
        found = architectures(Path(archive.extract(extensions[0], folder)), cuobjdump)
    return Contents(wheel.stat().st_size, found, glibc(wheel))


def architectures(extension: Path, cuobjdump: str) -> tuple[str, ...]:
    """What kernels are compiled to, oldest first: ``sm_90`` machine code, ``compute_120`` PTX."""

    def listed(option: str, name: str) -> list[str]:
        # cuobjdump exits with 255 if there is no device code at all, and says so.
        text = _output(cuobjdump, option, str(extension), may_fail=True)
        found = set(re.findall(rf"\.sm_(\d+[af]?)\.{name}", text))
        return sorted(found, key=lambda a: (int(re.sub(r"\D", "", a)), a))

    machine = [f"sm_{a}" for a in listed("--list-elf", "cubin")]
    return (*machine, *(f"compute_{a}" for a in listed("--list-ptx", "ptx")))


def glibc(wheel: Path) -> str:
    """The platform tag that the versioned symbols allow.

    libtorch, libc10 and libgomp stay outside, as for every extension of torch; that is why the
    file's own tag is ``linux_x86_64`` or ``linux_aarch64``.
    """
    report = json.loads(_output(sys.executable, "-m", "auditwheel", "show", "--json", str(wheel)))
    return str(report["sym_tag"])


def find_cuobjdump() -> str | None:
    """A cuobjdump on the path, in this environment's toolkit packages, or in its triton."""
    packages = Path(sysconfig.get_path("purelib"))
    candidates = [
        shutil.which("cuobjdump"),
        *packages.glob("nvidia/cu*/bin/cuobjdump"),
        *packages.glob("triton/backends/nvidia/bin/cuobjdump"),
    ]
    return next((str(c) for c in candidates if c), None)


def _output(*command: str, may_fail: bool = False) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=not may_fail).stdout


def main() -> int:
    summary, *_ = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("wheels", metavar="WHEEL", nargs="+", help="a file")
    names = parser.parse_args().wheels
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        sys.exit("no cuobjdump here; pip install nvidia-cuda-cuobjdump")
    for name in names:
        found = inspect(Path(name), cuobjdump)
        inside = " ".join(found.architectures) or "no CUDA"
        print(f"{Path(name).name}: {found.size / 1e6:.1f} MB, {inside}, {found.glibc}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
