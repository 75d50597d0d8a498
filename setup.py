"""Builds the compiled kernels by driving CMake; everything else is in pyproject.toml.

What is compiled is defined in CMakeLists.txt alone, what with is decided in scripts/toolchain.py,
and scripts/compiling.py calls CMake; docs/building.md says which environment variables are read.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "scripts"))
import compiling  # noqa: E402
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
        shutil.copy2(compiling.extension(CHOSEN), target)
        record.write_text(compiling.record(CHOSEN))

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


# A source distribution fits every torch, and what a build requires (egg_info) is the same for all:
# both are made where nothing can be compiled.
if "sdist" in sys.argv or sys.argv[-1] == "egg_info":
    CHOSEN = toolchain.Toolchain(None, None, "")
else:
    try:
        CHOSEN = toolchain.choose(os.environ)
    except toolchain.ToolchainError as refusal:
        sys.exit(f"guard-ops: {refusal}")

setup(
    version=compiling.version(CHOSEN),
    ext_modules=[Extension("guard_ops._C", sources=[], optional=False)],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython},
)
