"""The CPU kernels on 64-bit Arm, which this machine emulates: ``make test-arm``.

Compares the bits that the kernels compute there with those of this processor's, and runs the C++
tests there, of the longest two a part of the cases. Needs Debian's ``g++-aarch64-linux-gnu`` and
``qemu-user-static``. ``--bits``: only compares, which takes a fraction of the time.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import compiling  # noqa: E402
import toolchain  # noqa: E402

EMULATOR, COMPILER = "qemu-aarch64-static", "aarch64-linux-gnu-g++"
# Of the driver's and the kernels' thousands of cases, one in so many: their truth is computed in
# `long double`, which on Arm is software, here on an emulated processor.
STRIDE = 7
WITHOUT_FMA = "baseline"  # the instruction set whose fused multiply-add rounds in its own way


def differences(here: str, there: str) -> str:
    """What differs between two outputs of ``bits``, whose first lines name instruction sets.

    Raises:
        ValueError: an output has no cases, or is of a set that need not agree with the others.
    """
    (isa, *cases), (other, *expected) = here.splitlines(), there.splitlines()
    if not cases or WITHOUT_FMA in (isa, other):
        raise ValueError(f"bits of {isa} ({len(cases)} cases) and {other} cannot be compared")
    return "\n".join(difflib.unified_diff(expected, cases, other, isa, n=0, lineterm=""))


def main() -> int:
    """Compile, run and compare; 1 where a test fails or bits differ."""
    summary, *_ = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--bits", action="store_true", help="only compare the bits")
    bits_alone = parser.parse_args().bits
    missing = [tool for tool in (EMULATOR, COMPILER) if shutil.which(tool) is None]
    if missing:
        print(
            f"arm: {' and '.join(missing)} missing; Debian's packages are qemu-user-static and "
            "g++-aarch64-linux-gnu",
            file=sys.stderr,
        )
        return 1
    tests = {"GUARD_OPS_TESTS": "ON"}
    # An emulated device on an emulated processor would take minutes, and it tests what is C++ on
    # every processor.
    arm = tests | {
        "CMAKE_TOOLCHAIN_FILE": str(ROOT / "cmake" / "aarch64.cmake"),
        "GUARD_OPS_EMULATED_TEST": "OFF",
        "GUARD_OPS_TEST_STRIDE": str(STRIDE),
    }
    there = compiling.build(arm, "bits", "aarch64") / "csrc/tests/bits"
    here = compiling.build(tests, "bits") / "csrc/tests/bits"
    outputs = [
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for command in ([str(here)], [EMULATOR, str(there)])
    ]
    try:
        found = differences(*outputs)
    except ValueError as refusal:
        print(f"arm: {refusal}", file=sys.stderr)
        return 1
    isas = [output.split("\n", 1)[0] for output in outputs]
    print(found or f"arm: {isas[1]} gives the bits of {isas[0]}", flush=True)
    if found or bits_alone:
        return int(bool(found))
    folder = compiling.build(arm, "cpp_tests", "aarch64")
    ctest = toolchain.find_program("ctest", os.environ) or "ctest"
    return subprocess.call([str(ctest), "--test-dir", str(folder), "--verbose", "-j", "2"])


if __name__ == "__main__":
    sys.exit(main())
