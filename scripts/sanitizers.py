"""The CPU kernels and their bindings under the compiler's sanitizers: ``make sanitize``.

The C++ tests run under the address and undefined-behaviour sanitizers, those with threads under the
thread sanitizer, and the operators' Python tests with an extension compiled for the first two.
Any finding fails the test that it is found in.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import compiling  # noqa: E402
import toolchain  # noqa: E402

# Those of the operators on the `cpu` backend that compile and start nothing else.
PYTHON_TESTS = ("autograd", "errors", "goldens", "layouts", "nonfinite", "numerics", "sde_step")


class Sanitizer(NamedTuple):
    """What a build is compiled with, and which of the C++ tests it runs."""

    folder: str  # under build/
    checks: str
    tests: str  # a regular expression

    @property
    def definitions(self) -> dict[str, str]:
        """CMake's. The kernels are compiled at -O1, which takes less time.

        The emulated device is left out: its threads are fibers, whose stacks no sanitizer knows.
        """
        flags = f"-fsanitize={self.checks} -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
        return {
            "CMAKE_CXX_FLAGS": flags,
            "GUARD_OPS_OPTIMIZATION": "-O1",
            "GUARD_OPS_EMULATED_TEST": "OFF",
        }


ADDRESS = Sanitizer("address", "address,undefined", ".")
THREAD = Sanitizer("thread", "thread", "^(buffers|driver)_test$")


def cpp_tests(sanitizer: Sanitizer) -> int:
    """Compile and run the C++ tests."""
    definitions = sanitizer.definitions | {"GUARD_OPS_TESTS": "ON"}
    folder = compiling.build(definitions, "cpp_tests", sanitizer.folder)
    ctest = toolchain.find_program("ctest", os.environ) or "ctest"
    only = ["-R", sanitizer.tests]
    return subprocess.call(
        [str(ctest), "--test-dir", str(folder), "--output-on-failure", "-j", "2", *only],
        env=os.environ | {"GUARD_OPS_EVERY_CASE": "1"},
    )


def environment() -> dict[str, str]:
    """That of a Python whose extension is sanitized.

    The sanitizers' run time has to be there before Python is, and the C++ library, so that the run
    time finds its exceptions. Leaks are not looked for, as Python and torch leave much behind.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    libraries = [
        subprocess.check_output([*compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        sys.exit(
            f"sanitizers: {shlex.join(compiler)} has no shared run time of them; use GCC's g++"
        )
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_WAIT_POLICY": "passive",
    }


def python_tests(sanitizer: Sanitizer) -> int:
    """Compile the extension and run the operators' tests with it."""
    chosen = toolchain.choose(os.environ)
    print(f"guard-ops: {chosen.line}", flush=True)
    if chosen.torch is None:
        return 1
    definitions = compiling.definitions_of(chosen) | sanitizer.definitions
    (built,) = (compiling.build(definitions, "_C", sanitizer.folder) / "extension").glob("_C*.so")
    files = [f"tests/test_{name}.py" for name in PYTHON_TESTS]
    command = [sys.executable, __file__, "--pytest", str(built), "-q", "-k", "cpu", *files]
    command += ["-m", "not slow"]  # every combination
    return subprocess.call(command, cwd=ROOT, env=environment())


def pytest_with(extension: str, arguments: list[str]) -> int:
    """Run pytest in this process, with ``extension`` as ``guard_ops._C``."""
    import pytest
    import torch  # noqa: F401  its libraries have to be loaded first

    spec = importlib.util.spec_from_file_location("guard_ops._C", extension)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["guard_ops._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return int(pytest.main(arguments))


def main() -> int:
    """Run everything; 1 where anything is found."""
    if sys.argv[1:2] == ["--pytest"]:
        sys.path.insert(0, str(ROOT))
        return pytest_with(sys.argv[2], sys.argv[3:])
    summary, *_ = (__doc__ or "").splitlines()
    argparse.ArgumentParser(description=summary).parse_args()
    codes = [cpp_tests(ADDRESS), cpp_tests(THREAD), python_tests(ADDRESS)]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
