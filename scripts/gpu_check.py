"""Everything that needs a GPU, unattended, in at most ten minutes: ``make gpu-check``.

Needs no network: torch, triton, numpy, pytest, pytest-benchmark and, for the C++ extension, a
compiler. Without a GPU it says what it did not run and exits with 0. Whatever a step does, the ones
after it have their time, and what was found so far is in ``benchmarks/results/<device>.json``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import bounded  # noqa: E402
import sanitize  # noqa: E402
import toolchain  # noqa: E402

BEGAN = time.monotonic()
TOTAL_SECONDS = 600  # by default, from the start of this process
END_SECONDS = 15  # of them, to end what hangs and to say what was found
SECONDS = "{seconds}"  # in a command: how long the step may take, less
START_SECONDS = 15  # what importing torch takes, and ending


class Step(NamedTuple):
    """One part of the check."""

    name: str
    command: list[str]
    seconds: int  # at most
    least: int  # kept for it, whatever the steps before it take
    required: bool  # whether the check fails with it
    wanted: Callable[[], str] = lambda: ""  # why not to run it, or nothing
    variables: Mapping[str, str] = {}  # of its environment, besides
    grace: float | None = None  # seconds to say what it has found, once interrupted
    meaning: Mapping[int, str] = {}  # of an exit status


class Outcome(NamedTuple):
    """What became of a step; a failure that counts is in ``failed``."""

    step: str
    text: str
    seconds: float
    failed: bool

    def __str__(self) -> str:
        return f"{self.step}: {self.text}" + (f", {self.seconds:.0f} s" if self.seconds else "")


def no_build() -> str:
    """Why the C++ extension is not built here, or nothing."""
    compiler = os.environ.get("CXX", "c++").split(" ")[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler})"
    missing = toolchain.lacking(os.environ)
    return f"{', '.join(missing)} not found" if missing else ""


def plugins() -> list[str]:
    """pytest's options to run in several processes, and to end a test that hangs, where it can."""
    options = ["-o", "faulthandler_timeout=60"]  # says what a hung test was doing
    if importlib.util.find_spec("xdist"):  # most of the time Triton and its assembler compile
        workers = min(12, max(2, len(os.sched_getaffinity(0)) - 2))
        options += ["-n", str(workers), "--max-worker-restart=64"]
        if importlib.util.find_spec("pytest_timeout"):  # it ends the process, xdist starts another
            options += ["--timeout=60", "--timeout-method=thread"]
    return options


PYTHON = sys.executable
PYTEST = [PYTHON, "-m", "pytest", "-m", "gpu", "-q", *plugins()]
GPU_TESTS = [  # what only a device can show first; the trainer's tests would want its packages
    "tests/device/test_cuda_paths.py",
    "tests/device/test_device_launches.py",
    "tests/device/test_device_loss.py",
    "tests/device/test_triton_launch_paths.py",
    "tests/kernels",
    "tests/device/test_device_goldens.py",
]
ONE_OF_MANY = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}  # processes
BOUND_MISSED = 3  # benchmarks.device's exit status
STEPS = [  # the benchmarks' numbers are had nowhere else, so they come before what takes long
    Step("build", [PYTHON, "scripts/compiling.py"], 200, 0, False, no_build),
    Step("doctor", [PYTHON, "-m", "guard_ops", "doctor"], 80, 30, True),
    Step(
        "benchmarks",
        [PYTHON, "-m", "benchmarks.device", "--seconds", SECONDS],
        200,
        140,
        True,
        meaning={BOUND_MISSED: "a bound is missed, or was not measured"},
    ),
    # xdist waits 10 s for a worker that a kernel holds, before it says what failed
    Step("tests", [*PYTEST, *GPU_TESTS], 300, 120, True, variables=ONE_OF_MANY, grace=12.0),
    Step(
        "sanitizer",
        [PYTHON, "scripts/sanitize.py", "--seconds", SECONDS],
        200,
        90,
        True,
        sanitize.missing,
        variables=ONE_OF_MANY,
    ),
]


def command_of(step: Step, seconds: float) -> list[str]:
    """The step's command, which may say how long it may take."""
    known = f"{max(1.0, seconds - START_SECONDS):.0f}"
    return [known if word == SECONDS else word for word in step.command]


def limit(steps: Sequence[Step], index: int, left: float) -> float:
    """Seconds that a step may take of those that are left: all but the least of the later ones."""
    later = sum(step.least for step in steps[index + 1 :])
    return max(1.0, min(steps[index].seconds, left - later))


def run_steps(
    steps: Sequence[Step],
    environment: Mapping[str, str],
    total: float = TOTAL_SECONDS - END_SECONDS,
    after: Callable[[Step, list[Outcome]], None] = lambda step, outcomes: None,
) -> list[Outcome]:
    """One step after the other, none of which takes another's least time.

    ``total`` seconds from now on. ``after`` is called when a step is over, and may add outcomes of
    its own.
    """
    start = time.monotonic()
    outcomes: list[Outcome] = []
    for index, step in enumerate(steps):
        if why := step.wanted():
            outcomes.append(Outcome(step.name, f"not run: {why}", 0.0, False))
        else:
            began = time.monotonic()
            seconds = limit(steps, index, total - (began - start) - (step.grace or 0))
            print(f"gpu-check: {step.name}, at most {seconds:.0f} s", flush=True)
            variables = {**environment, **step.variables}
            command = command_of(step, seconds)
            status, _ = bounded.run(command, seconds, ROOT, variables, grace=step.grace)
            text = "passed"
            if status is None:
                text = f"FAILED: more than {seconds:.0f} s"
            elif status:
                text = f"FAILED: {step.meaning.get(status, f'exit status {status}')}"
            failed = step.required and status != 0
            outcomes.append(Outcome(step.name, text, time.monotonic() - began, failed))
        known = len(outcomes) - 1
        after(step, outcomes)
        print("\n".join(f"gpu-check: {outcome}" for outcome in outcomes[known:]), flush=True)
    return outcomes


def backends(environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """The backends that guard_ops has now, and why not the others; asked of a new process."""
    code = (
        "import json, guard_ops.backends as b;"
        "print(json.dumps([b.available_backends(), b.unavailable_backends()]))"
    )
    status, text = bounded.run([PYTHON, "-c", code], 60, ROOT, environment, output=subprocess.PIPE)
    lines = text.strip().splitlines() or [""]
    if status != 0:
        return [], dict.fromkeys(("triton", "cuda"), f"guard_ops: {lines[-1]}")
    available, unavailable = json.loads(lines[-1])
    return available, unavailable


def judge_backends(
    available: Sequence[str], unavailable: Mapping[str, str], build: str
) -> list[Outcome]:
    """triton must be there where there is a GPU; that cuda is missing from a build is said."""
    found = []
    for name, needed in (("triton", True), ("cuda", False)):
        why = unavailable.get(name, "unknown")
        if name in available:
            text = "available"
        elif needed:
            text = f"FAILED: torch sees a GPU but guard_ops has no {name} backend: {why}"
        elif build == "passed":
            text = f"MISSING: the build passed but has no {name} backend: {why}"
        else:
            text = f"missing, build {build}: {why}"
        found.append(Outcome(f"backend {name}", text, 0.0, needed and name not in available))
    return found


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


def save(outcomes: Sequence[Outcome]) -> str:
    """To the benchmarks' file of this device, in a section of their own; the file, or why not.

    Nothing of guard_ops is imported: it may be what does not work.
    """
    import torch

    from benchmarks import results

    environment = {
        "device": torch.cuda.get_device_name(0),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    rows = [outcome._asdict() for outcome in outcomes]
    try:
        path = results.put("gpu_check", {"environment": environment, "rows": rows}, device="cuda")
    except (OSError, ValueError) as error:
        return f"no file: {error}"
    return f"benchmarks/results/{path.name}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps; 0 when every required one passed, or there is no GPU."""
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=TOTAL_SECONDS, help=f"at most; default {TOTAL_SECONDS}"
    )
    end = BEGAN + parser.parse_args(arguments).seconds - END_SECONDS
    if reason := without_a_gpu():
        print(f"gpu-check: skipped, {reason}. Not run:")
        for step in STEPS:
            print(f"  {step.name}: {' '.join(['python', *command_of(step, step.seconds)[1:]])}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu-check: terminated"))  # steps too
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    env.setdefault("CMAKE_CUDA_ARCHITECTURES", architecture())
    saved = "nothing"

    def after(step: Step, outcomes: list[Outcome]) -> None:
        nonlocal saved
        if step.name == "build":
            outcomes += judge_backends(*backends(env), outcomes[-1].text)
        saved = save(outcomes)  # whatever becomes of the next one

    outcomes = run_steps(STEPS, env, end - time.monotonic(), after)
    print(f"gpu-check: {time.monotonic() - BEGAN:.0f} s; also in {saved}")
    print("\n".join(f"  {outcome}" for outcome in outcomes))
    return 1 if any(outcome.failed for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
