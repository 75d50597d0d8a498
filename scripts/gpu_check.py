"""Everything that needs a GPU, unattended, in at most ten minutes: ``make gpu-check``.

Needs no network: torch, triton, numpy, pytest, pytest-benchmark and, for the C++ extension, a
compiler. Without a GPU it says what it did not run and exits with 0.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 600


class Step(NamedTuple):
    """One part of the check."""

    name: str
    command: list[str]
    seconds: int  # at most
    required: bool  # whether the check fails with it
    wanted: Callable[[], str] = lambda: ""  # why not to run it, or nothing


def no_build() -> str:
    """Why the C++ extension is not built here, or nothing."""
    import importlib.util

    compiler = os.environ.get("CXX", "c++").split(" ")[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler})"
    missing = [n for n in ("setuptools", "pybind11") if importlib.util.find_spec(n) is None]
    missing += [n for n in ("cmake", "ninja") if shutil.which(n) is None]
    return f"{', '.join(missing)} not found" if missing else ""


PYTHON = sys.executable
GPU_TESTS = ["tests/device", "tests/kernels"]  # the trainer's tests would want its packages
STEPS = [
    Step("build", [PYTHON, "setup.py", "build_ext", "--inplace"], 240, False, no_build),
    Step("doctor", [PYTHON, "-m", "guard_ops", "doctor"], 60, True),
    Step("tests", [PYTHON, "-m", "pytest", "-m", "gpu", "-q", *GPU_TESTS], 360, True),
    Step("benchmarks", [PYTHON, "-m", "benchmarks.device"], 300, True),
    Step("sanitizer", [PYTHON, "scripts/sanitize.py"], 180, True),
]


def without_a_gpu() -> str:
    """Why there is nothing to check on, or nothing."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return "" if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU"


def architecture() -> str:
    """This device's, for CMake: the check need not compile for any other."""
    import torch

    major, minor = torch.cuda.get_device_capability() if torch.version.cuda else (8, 0)
    return f"{major}{minor}-real"


def main() -> int:
    """Run the steps; 0 when every required one passed, or there is no GPU."""
    if reason := without_a_gpu():
        print(f"gpu-check: skipped, {reason}. Not run:")
        for step in STEPS:
            print(f"  {step.name}: {' '.join(['python', *step.command[1:]])}")
        return 0
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    env.setdefault("CMAKE_CUDA_ARCHITECTURES", architecture())
    start, outcomes = time.monotonic(), {}
    for step in STEPS:
        if why := step.wanted():
            outcomes[step.name] = f"not run: {why}"
            continue
        left = TOTAL_SECONDS - (time.monotonic() - start)
        began = time.monotonic()
        print(f"gpu-check: {step.name}", flush=True)
        try:
            limit = max(1.0, min(step.seconds, left))
            done = subprocess.run(step.command, cwd=ROOT, env=env, check=False, timeout=limit)
            outcome = "passed" if done.returncode == 0 else f"FAILED with {done.returncode}"
        except subprocess.TimeoutExpired:
            outcome = f"FAILED: more than {limit:.0f} s"
        outcomes[step.name] = f"{outcome}, {time.monotonic() - began:.0f} s"
    print(f"gpu-check: {time.monotonic() - start:.0f} s")
    for name, outcome in outcomes.items():
        print(f"  {name}: {outcome}")
    required = [step.name for step in STEPS if step.required]
    return 1 if any("FAILED" in outcomes[name] for name in required) else 0


if __name__ == "__main__":
    sys.exit(main())
