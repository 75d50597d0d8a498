"""Builds the compiled kernels by driving CMake; everything else is in pyproject.toml.

What is compiled is defined in CMakeLists.txt alone. Without torch or a C++ compiler the package is
installed without kernels and runs on the plain PyTorch backend, with one warning.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildPython(build_py):
    """Leaves pytest's files in the checkout: they are not part of ``guard_ops.benchmarks``."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [m for m in modules if not m[1].startswith(("test_", "conftest"))]


class CMakeBuild(build_ext):
    """Configures, builds and copies guard_ops/_C where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        missing = self._missing()
        if missing:
            print(
                f"guard-ops: WARNING: no compiled kernels, {missing}; the package will run on the "
                "plain PyTorch `reference` backend",
                file=sys.stderr,
            )
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # an earlier build's
            return
        import pybind11
        import torch
        import torch.utils.cpp_extension

        print("guard-ops: building the CPU kernels (this version has no CUDA kernels)")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # Kept between installs, so that the next one compiles what changed; one for each torch.
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch.__version__}"
        build.mkdir(parents=True, exist_ok=True)
        torch_libraries = Path(torch.__file__).parent / "lib"
        definitions = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_INSTALL_PREFIX": str(build / "install"),
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja") or "ninja",
            "Python_EXECUTABLE": sys.executable,
            "PYBIND11_FINDPYTHON": "ON",
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "GUARD_OPS_VERSION": self.distribution.get_version(),
            "GUARD_OPS_TORCH_VERSION": torch.__version__,
            "GUARD_OPS_TORCH_INCLUDES": ";".join(torch.utils.cpp_extension.include_paths()),
            "GUARD_OPS_TORCH_LIBRARIES": str(torch_libraries),
        }
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        options = [f"-D{name}={value}" for name, value in definitions.items()]
        run = self._run
        run("cmake", "-G", "Ninja", *options, "-S", str(ROOT), "-B", str(build))
        run("cmake", "--build", str(build), "--parallel", jobs)
        run("cmake", "--install", str(build))
        (built,) = (build / "install").glob("_C*.so")
        shutil.copy2(built, target)

    @staticmethod
    def _missing() -> str:
        """What a build needs and this environment lacks, or nothing."""
        if importlib.util.find_spec("torch") is None:
            return "torch is not importable here (install torch first, then --no-build-isolation)"
        compiler = os.environ.get("CXX", "").split(" ")[0]
        candidates = [compiler] if compiler else ["c++", "g++", "clang++"]
        if not any(shutil.which(name) for name in candidates):
            return f"no C++ compiler found ({', '.join(candidates)})"
        return ""

    @staticmethod
    def _run(*command: str) -> None:
        subprocess.run(command, check=True)


setup(
    ext_modules=[Extension("guard_ops._C", sources=[], optional=False)],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython},
)
