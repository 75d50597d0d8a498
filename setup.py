"""Builds the compiled kernels by driving CMake; everything else is in pyproject.toml.

What is compiled is defined in CMakeLists.txt alone, what with is decided in scripts/toolchain.py;
docs/building.md says which environment variables it reads.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "scripts"))
import toolchain  # noqa: E402


class BuildPython(build_py):
    """Leaves pytest's files in the checkout: they are not part of ``guard_ops.benchmarks``."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [m for m in modules if not m[1].startswith(("test_", "conftest"))]


class CMakeBuild(build_ext):
    """Configures, builds and copies guard_ops/_C, with its record, where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        record = target.with_suffix(".json")
        for earlier in (target, record):
            earlier.unlink(missing_ok=True)
        print(f"guard-ops: {CHOSEN.line}", file=sys.stderr)
        if CHOSEN.torch is None:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(self._compile(CHOSEN.torch, CHOSEN.nvcc), target)
        # What the extension fits, to be read before it is loaded (guard_ops/extension.py).
        cuda = CHOSEN.nvcc.version if CHOSEN.nvcc else None
        record.write_text(json.dumps({"torch": CHOSEN.torch.version, "cuda": cuda}) + "\n")

    def copy_extensions_to_source(self) -> None:
        """For an editable install; nothing built leaves nothing of an earlier build behind."""
        for ext in self.extensions:
            extension = Path(self.get_ext_filename(ext.name))
            for name in (extension, extension.with_suffix(".json")):
                built, inplace = Path(self.build_lib) / name, ROOT / name
                inplace.unlink(missing_ok=True)
                if built.is_file():
                    shutil.copy2(built, inplace)

    def get_outputs(self) -> list[str]:
        return [
            f for out in super().get_outputs() for f in (out, str(Path(out).with_suffix(".json")))
        ]

    def _compile(self, torch: toolchain.Torch, nvcc: toolchain.Nvcc | None) -> Path:
        import pybind11

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
            "GUARD_OPS_VERSION": self.distribution.get_version(),
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
        run = subprocess.check_call
        cmake = toolchain.find_program("cmake", os.environ)
        run([cmake, "-G", "Ninja", *options, "-S", str(ROOT), "-B", str(build)])
        run([cmake, "--build", str(build), "--parallel", jobs])
        run([cmake, "--install", str(build)])
        (built,) = (build / "install").glob("_C*.so")
        return built


def version(chosen: toolchain.Toolchain) -> str:
    """The package's version with what it is compiled for, ``0.1.0+cu130torch2.14``."""
    source = (ROOT / "guard_ops" / "__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"', source, re.MULTILINE)[1] + chosen.local_version


if "sdist" in sys.argv:  # compiles nothing, fits every torch
    CHOSEN = toolchain.Toolchain(None, None, "")
else:
    try:
        CHOSEN = toolchain.choose(os.environ)
        toolchain.architectures(os.environ)
    except toolchain.ToolchainError as refusal:
        sys.exit(f"guard-ops: {refusal}")

setup(
    version=version(CHOSEN),
    ext_modules=[Extension("guard_ops._C", sources=[], optional=False)],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython},
)
