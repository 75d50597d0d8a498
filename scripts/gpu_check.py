"""Everything that needs a GPU, unattended, in at most ten minutes: ``make gpu-check``.

Needs no network: torch, triton, numpy, pytest, pytest-benchmark and, for the C++ extension, a
compiler. Without a GPU it says what it did not run and exits with 0. Whatever a step does, the ones
after it have their time, and what was found so far is in ``benchmarks/results/<device>.json``. With
``--out FOLDER`` that file and everything that is printed are in the folder too, all the while. A
second run of the same sources on such a device does what the first has not: steps that passed, and
rows that are measured, are not repeated (``--again`` repeats them).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import bounded  # noqa: E402
import sanitize  # noqa: E402
import toolchain  # noqa: E402

BEGAN = time.monotonic()
TOTAL_SECONDS = 600  # how long the check may take by default, from the start of this process
END_SECONDS = 15  # how much of that is kept to end what hangs and to say what was found
SECONDS = "{seconds}"  # stands in a command for the seconds that the step has, less START_SECONDS
OPTIONS = "{options}"  # stands in a command for those of this program that the step takes too
START_SECONDS = 15  # how long a step takes to import torch, and to end


class Step(NamedTuple):
    """One part of the check."""

    name: str
    command: list[str]
    seconds: int  # the most that it may take
    least: int  # the seconds that earlier steps have to leave it
    required: bool  # whether the check fails if it does
    wanted: Callable[[], str] = lambda: ""  # returns why not to run it; empty if it is to run
    variables: Mapping[str, str] = {}  # added to its environment
    grace: float | None = None  # seconds that it has to say what it found, once interrupted
    meaning: Mapping[int, str] = {}  # exit status -> what it means
    not_run: Mapping[
        int, str
    ] = {}  # exit status that is no failure -> why there was nothing to run
    once: bool = True  # whether it is not run again where it has passed


PASSED_EARLIER = "passed in an earlier run"


class Outcome(NamedTuple):
    """What became of a step; ``failed`` says whether it makes the check fail."""

    step: str
    text: str
    seconds: float
    failed: bool

    def __str__(self) -> str:
        return f"{self.step}: {self.text}" + (f", {self.seconds:.0f} s" if self.seconds else "")


def no_build() -> str:
    """Why the C++ extension cannot be built here; empty if it can."""
    if absent := toolchain.no_compiler(os.environ):
        return f"no C++ compiler ({absent})"
    missing = toolchain.lacking(os.environ)
    return f"{', '.join(missing)} not found" if missing else ""


def plugins() -> list[str]:
    """pytest's options to use several processes and to end tests that hang, if it has plugins."""
    options = ["-o", "faulthandler_timeout=60"]  # prints what a test that hangs is doing
    if importlib.util.find_spec("xdist"):  # the tests mostly compile Triton, so processes pay
        workers = min(12, max(2, len(os.sched_getaffinity(0)) - 2))
        options += ["-n", str(workers), "--max-worker-restart=64"]
        # pytest-timeout ends the process of a test that hangs, and xdist starts another
        if importlib.util.find_spec("pytest_timeout"):
            options += ["--timeout=60", "--timeout-method=thread"]
    return options


def no_cuda_kernels() -> str:
    """Why the tests of the backend ``cuda`` have nothing to test; empty if they have."""
    for record in (ROOT / "guard_ops").glob("_C*.json"):
        try:
            if json.loads(record.read_text()).get("cuda"):
                return ""
        except (OSError, ValueError, AttributeError):
            continue
    return "the extension has no CUDA kernels"


PYTHON = sys.executable
PYTEST = [PYTHON, "-m", "pytest", "-m", "gpu", "-q"]
# What only a device can show comes first. The trainer's tests are left out: they need its packages.
GPU_TESTS = [
    "tests/device/test_cuda_paths.py",
    "tests/device/test_device_launches.py",
    "tests/device/test_device_loss.py",
    "tests/device/test_triton_launch_paths.py",
    "tests/kernels",
    "tests/device/test_device_goldens.py",
]
# Steps of several processes share the cores, so each process takes few of them.
# Each compiles in its own process, where torch would start one a core for each of them.
ONE_OF_MANY = {
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "passive",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
BOUND_MISSED = 3  # benchmarks.device's exit status
# First whether the CUDA kernels are right, which compiles nothing and takes seconds; then the
# benchmarks, as nothing else gives their numbers; then what takes long.
STEPS = [
    Step("build", [PYTHON, "scripts/compiling.py"], 200, 60, False, no_build, once=False),
    Step("doctor", [PYTHON, "-m", "guard_ops", "doctor"], 80, 30, True, once=False),
    Step("CUDA kernels", [*PYTEST, "-k", "cuda", *GPU_TESTS[:3]], 60, 45, True, no_cuda_kernels),
    Step(
        "benchmarks",
        [PYTHON, "-m", "benchmarks.device", "--seconds", SECONDS, OPTIONS],
        240,
        140,
        True,
        meaning={BOUND_MISSED: "a bound is missed, or was not measured"},
    ),
    # Before xdist says what failed, it waits 10 s for a worker that is stuck in a kernel.
    Step(
        "tests",
        [*PYTEST, *plugins(), *GPU_TESTS],
        300,
        120,
        True,
        variables=ONE_OF_MANY,
        grace=12.0,
    ),
    Step(
        "sanitizer",
        [PYTHON, "scripts/sanitize.py", "--seconds", SECONDS],
        200,
        90,
        True,
        sanitize.missing,
        variables=ONE_OF_MANY,
        not_run={sanitize.NOT_RUN: "compute-sanitizer is refused the device, or had no time"},
    ),
]


def command_of(step: Step, seconds: float, options: Sequence[str] = ()) -> list[str]:
    """The step's command, with the seconds that it has in the place of ``SECONDS``."""
    known = f"{max(1.0, seconds - START_SECONDS):.0f}"
    words = [known if word == SECONDS else word for word in step.command]
    return [new for word in words for new in (options if word == OPTIONS else (word,))]


def limit(steps: Sequence[Step], index: int, left: float) -> float:
    """Seconds that a step may take: what is left, less what is kept for the later ones.

    Where that is less than its own least, it has its part of what all of them may take.
    """
    step, later = steps[index], steps[index + 1 :]
    kept = left - sum(other.least for other in later)
    part = left * step.seconds / (step.seconds + sum(other.seconds for other in later))
    return max(1.0, min(step.seconds, kept if kept >= step.least else part))


def run_steps(
    steps: Sequence[Step],
    environment: Mapping[str, str],
    total: float = TOTAL_SECONDS - END_SECONDS,
    after: Callable[[Step, list[Outcome]], None] = lambda step, outcomes: None,
    passed: Sequence[str] = (),
    options: Sequence[str] = (),
) -> list[Outcome]:
    """Runs the steps in order within ``total`` seconds, leaving each of them its ``least``.

    ``after`` is called when a step is over, and may add outcomes of its own. ``passed``: the steps
    that an earlier run has passed; ``options``: what stands for ``OPTIONS``.
    """
    start = time.monotonic()
    outcomes: list[Outcome] = []
    steps = [step for step in steps if not (step.once and step.name in passed)]
    outcomes += [Outcome(name, PASSED_EARLIER, 0.0, False) for name in passed]
    for index, step in enumerate(steps):
        if why := step.wanted():
            outcomes.append(Outcome(step.name, f"not run: {why}", 0.0, False))
        else:
            began = time.monotonic()
            seconds = limit(steps, index, total - (began - start) - (step.grace or 0))
            print(f"gpu-check: {step.name}, at most {seconds:.0f} s", flush=True)
            variables = {**environment, **step.variables}
            command = command_of(step, seconds, options)
            status, _ = bounded.run(command, seconds, ROOT, variables, grace=step.grace)
            text = "passed"
            if status is None:
                text = f"FAILED: more than {seconds:.0f} s"
            elif status in step.not_run:
                text = f"not run: {step.not_run[status]}"
            elif status:
                text = f"FAILED: {step.meaning.get(status, f'exit status {status}')}"
            failed = step.required and text.startswith("FAILED")
            outcomes.append(Outcome(step.name, text, time.monotonic() - began, failed))
        known = len(outcomes) - 1
        after(step, outcomes)
        print("\n".join(f"gpu-check: {outcome}" for outcome in outcomes[known:]), flush=True)
    return outcomes


def backends(environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """The backends that guard_ops has now, and why not the others; a new process finds out."""
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
    """A GPU must have the backend triton; that cuda is missing from a build is only reported."""
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
    """Why there is no GPU to check on; empty if there is one."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return "" if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU"


def architecture() -> str:
    """This device's architecture, for CMake: the check need not compile for any other."""
    import torch

    major, minor = torch.cuda.get_device_capability() if torch.version.cuda else (8, 0)
    return f"{major}{minor}-real"


def here() -> dict[str, Any]:
    """What has to be the same for an earlier run's outcomes to hold, and the date."""
    import torch

    from benchmarks import results

    return {
        "device": torch.cuda.get_device_name(0),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "sources": results.sources(),
    }


def passed_earlier(folder: Path | None = None) -> list[str]:
    """The steps that an earlier run of these sources has passed on such a device."""
    from benchmarks import results

    section = results.known("gpu_check", folder or results.FOLDER, "cuda")
    now, then = here(), section.get("environment", {})
    if any(now[name] != then.get(name) for name in now.keys() - {"date"}):
        return []
    passed = [row["step"] for row in section.get("rows", [])
              if row.get("text") in ("passed", PASSED_EARLIER)]  # fmt: skip
    return [step.name for step in STEPS if step.once and step.name in passed]


def save(outcomes: Sequence[Outcome], out: Path | None = None) -> str:
    """Writes the outcomes into a section of this device's benchmark file; says where, or why not.

    It imports nothing of guard_ops, which may be what does not work.
    """
    from benchmarks import results

    rows = [outcome._asdict() for outcome in outcomes]
    section = {"environment": here(), "rows": rows}
    try:
        path = results.put("gpu_check", section, device="cuda", copy_to=out)
    except (OSError, ValueError) as error:
        return f"no file: {error}"
    return f"benchmarks/results/{path.name}"


@contextlib.contextmanager
def printed_too(log: Path | None) -> Iterator[None]:
    """Inside the block, what this process and those it starts print is in the file as well."""
    if log is None:
        yield
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    kept = os.dup(1), os.dup(2)
    # It is in a session of its own, so that what ends this process does not end it before the end.
    with subprocess.Popen(
        ["tee", "-a", str(log)], stdin=subprocess.PIPE, start_new_session=True
    ) as tee:
        assert tee.stdin is not None
        os.dup2(tee.stdin.fileno(), 1)
        os.dup2(tee.stdin.fileno(), 2)
        tee.stdin.close()
        try:
            yield
        finally:
            sys.stdout.flush()
            for number, descriptor in zip((1, 2), kept, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps; returns 0 if every required one passed, or if there is no GPU."""
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=TOTAL_SECONDS, help=f"at most; default {TOTAL_SECONDS}"
    )
    parser.add_argument(
        "--out", type=Path, help="a folder that gets the numbers and the output too, all the while"
    )
    parser.add_argument("--again", action="store_true", help="repeat what an earlier run has done")
    options = parser.parse_args(arguments)
    end = BEGAN + options.seconds - END_SECONDS
    if reason := without_a_gpu():
        print(f"gpu-check: skipped, {reason}. Not run:")
        for step in STEPS:
            print(f"  {step.name}: {' '.join(['python', *command_of(step, step.seconds)[1:]])}")
        return 0
    out = options.out.absolute() if options.out else None
    with printed_too(out / "gpu-check.log" if out else None):
        return check(end, out, options.again)


def check(end: float, out: Path | None, again: bool) -> int:
    """Run the steps until ``end``, on the clock of ``time.monotonic``; the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu-check: terminated"))  # ends steps too
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    env.setdefault("CMAKE_CUDA_ARCHITECTURES", architecture())
    saved = "nothing"

    def after(step: Step, outcomes: list[Outcome]) -> None:
        nonlocal saved
        if step.name == "build":
            outcomes += judge_backends(*backends(env), outcomes[-1].text)
        saved = save(outcomes, out)  # in case the next step ends this process

    passed = [] if again else passed_earlier()
    words = [*(["--out", str(out)] if out else []), *(["--again"] if again else [])]
    outcomes = run_steps(STEPS, env, end - time.monotonic(), after, passed, words)
    print(f"gpu-check: {time.monotonic() - BEGAN:.0f} s; also in {saved}")
    print("\n".join(f"  {outcome}" for outcome in outcomes))
    return 1 if any(outcome.failed for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
