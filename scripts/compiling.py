"""Compiles guard_ops/_C with CMake: for setup.py; as a program, in place without setuptools."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import toolchain  # noqa: E402


def version(chosen: toolchain.Toolchain) -> str:
    """The package's version with what it is compiled for, ``0.1.0+cu130torch2.14``."""
    source = (ROOT / "guard_ops" / "__init__.py").read_text()
    (number,) = re.findall(r'^__version__ = "(.+)"', source, re.MULTILINE)
    return str(number) + chosen.local_version


def record(chosen: toolchain.Toolchain) -> str:
    """What the extension fits, to be read before it is loaded (guard_ops/extension.py)."""
    assert chosen.torch is not None
    cuda = chosen.nvcc.version if chosen.nvcc else None
    return json.dumps({"torch": chosen.torch.version, "cuda": cuda}) + "\n"


def extension(chosen: toolchain.Toolchain, emulated: bool = False) -> Path:
    """Compile; the extension's file. ``emulated``: the one with CUDA kernels that a CPU runs."""
    import pybind11

    torch, nvcc = chosen.torch, chosen.nvcc
    assert torch is not None
    # Kept between installs, so that the next one compiles what changed; one for each torch.
    kind = f"cu{nvcc.version}" if nvcc else "cpu"
    build = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch.version}-{kind}"
    build.mkdir(parents=True, exist_ok=True)
    include = torch.folder / "include"
    definitions = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_INSTALL_PREFIX": str(build / "install"),
        "CMAKE_MAKE_PROGRAM": toolchain.find_program("ninja", os.environ),
        "Python_EXECUTABLE": sys.executable,
        "PYBIND11_FINDPYTHON": "ON",
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "GUARD_OPS_VERSION": version(chosen),
        "GUARD_OPS_TORCH_VERSION": torch.version,
        "GUARD_OPS_TORCH_INCLUDES": f"{include};{include / 'torch/csrc/api/include'}",
        "GUARD_OPS_TORCH_LIBRARIES": str(torch.folder / "lib"),
        "GUARD_OPS_CUDA": "ON" if nvcc else "OFF",
    }
    if nvcc:
        definitions["GUARD_OPS_CUDA_VERSION"] = nvcc.version
        definitions["CMAKE_CUDA_COMPILER"] = str(nvcc.path)
        # Passed when empty too (the default), or the kept folder's last choice would stay.
        definitions["CMAKE_CUDA_ARCHITECTURES"] = toolchain.architectures(os.environ)
    options = [f"-D{name}={value}" for name, value in definitions.items()]
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    cmake = toolchain.find_program("cmake", os.environ) or "cmake"
    run = subprocess.check_call
    run([cmake, "-G", "Ninja", *options, "-S", str(ROOT), "-B", str(build)])
    target = ["--target", "emulated"] if emulated else []
    run([cmake, "--build", str(build), "--parallel", jobs, *target])
    if not emulated:
        run([cmake, "--install", str(build)])
    (built,) = (build / ("emulated" if emulated else "install")).glob("_C*.so")
    return built


def main() -> int:
    """Compile into the checkout, for the tests with ``--emulated``; 1 where nothing can be."""
    try:
        chosen = toolchain.choose(os.environ)
        toolchain.architectures(os.environ)
    except toolchain.ToolchainError as refusal:
        print(f"guard-ops: {refusal}", file=sys.stderr)
        return 1
    print(f"guard-ops: {chosen.line}", flush=True)
    if chosen.torch is None:
        return 1
    if "--emulated" in sys.argv:
        folder = ROOT / "build" / "emulated"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy2(extension(chosen, emulated=True), folder)
        return 0
    target = ROOT / "guard_ops" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    for earlier in (target, target.with_suffix(".json")):
        earlier.unlink(missing_ok=True)
    shutil.copy2(extension(chosen), target)
    target.with_suffix(".json").write_text(record(chosen))
    return 0


if __name__ == "__main__":
    sys.exit(main())
