"""Compiles guard_ops/_C with CMake: for setup.py; as a program, in place without setuptools.

For the tests, ``--emulated`` compiles the extension with CUDA kernels that a CPU runs instead, and
``--tests`` compiles and runs the C++ tests, without torch.
"""

from __future__ import annotations

import fcntl
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
    source = (ROOT / "guard_ops" / "version.py").read_text()
    (number,) = re.findall(r'^__version__ = "(.+)"', source, re.MULTILINE)
    return str(number) + chosen.local_version


def record(chosen: toolchain.Toolchain) -> str:
    """The versions that the extension fits, which guard_ops/extension.py reads before loading."""
    assert chosen.torch is not None
    cuda = chosen.nvcc.version if chosen.nvcc else None
    return json.dumps({"torch": chosen.torch.version, "cuda": cuda}) + "\n"


def build(
    definitions: dict[str, str], target: str, place: str = str(sys.implementation.cache_tag)
) -> Path:
    """Configure and build one target; the folder ``place``, which knows earlier definitions.

    It is one for the extension, the one for the tests and the C++ tests, which are mostly the same
    objects, and is kept: another install compiles what changed.
    """
    folder = ROOT / "build" / place
    folder.mkdir(parents=True, exist_ok=True)
    ninja = toolchain.find_program("ninja", os.environ)
    common = {"CMAKE_BUILD_TYPE": "Release", "CMAKE_MAKE_PROGRAM": str(ninja)}
    options = [f"-D{name}={value}" for name, value in (common | definitions).items()]
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    cmake = toolchain.find_program("cmake", os.environ) or "cmake"
    with (folder / "lock").open("w") as lock:  # `make test` compiles and installs at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = subprocess.check_call
        run([cmake, "-G", "Ninja", *options, "-S", str(ROOT), "-B", str(folder)])
        run([cmake, "--build", str(folder), "--parallel", jobs, "--target", target])
    return folder


def definitions_of(chosen: toolchain.Toolchain) -> dict[str, str]:
    """CMake's definitions of an extension."""
    import pybind11

    torch, nvcc = chosen.torch, chosen.nvcc
    assert torch is not None
    include = torch.folder / "include"
    definitions = {
        "Python_EXECUTABLE": sys.executable,
        "PYBIND11_FINDPYTHON": "ON",
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "GUARD_OPS_EXTENSION": "ON",
        "GUARD_OPS_VERSION": version(chosen),
        "GUARD_OPS_TORCH_VERSION": torch.version,
        "GUARD_OPS_TORCH_INCLUDES": f"{include};{include / 'torch/csrc/api/include'}",
        "GUARD_OPS_TORCH_LIBRARIES": str(torch.folder / "lib"),
        "GUARD_OPS_CUDA": "ON" if nvcc else "OFF",
    }
    if nvcc:
        definitions["GUARD_OPS_CUDA_VERSION"] = nvcc.version
        definitions["CMAKE_CUDA_COMPILER"] = str(nvcc.path)
        # This is passed even if empty (the default); else the kept folder's last choice would stay.
        definitions["CMAKE_CUDA_ARCHITECTURES"] = chosen.architectures
    return definitions


def extension(chosen: toolchain.Toolchain, emulated: bool = False) -> Path:
    """Compiles the extension; returns its file.

    ``emulated``: compile the one whose CUDA kernels a CPU runs.
    """
    folder = build(definitions_of(chosen), "emulated" if emulated else "_C")
    (built,) = (folder / ("emulated" if emulated else "extension")).glob("_C*.so")
    return built


def main() -> int:
    """Compile into the checkout, or for the tests; 1 where nothing can be."""
    if "--tests" in sys.argv:
        folder = build({"GUARD_OPS_TESTS": "ON"}, "cpp_tests")
        ctest = toolchain.find_program("ctest", os.environ) or "ctest"
        command = [ctest, "--test-dir", str(folder), "--output-on-failure", "-j", "2"]
        return subprocess.call(command)
    try:
        chosen = toolchain.choose(os.environ)
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
