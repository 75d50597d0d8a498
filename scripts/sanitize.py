"""The GPU kernels under compute-sanitizer: ``python scripts/sanitize.py``.

Runs memcheck and racecheck, then initcheck and synccheck, over small calls of every op by every
path of the ``cuda`` and ``triton`` backends, those of a pair side by side and each for a limited
time. Without a GPU, or without the tool, it says so and exits with 0; where the machine refuses the
tool its device, with ``NOT_RUN``; a finding, or a run that did not end, exits with 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts")]

import bounded  # noqa: E402

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TOGETHER = 2  # tools that run side by side; what comes later has the time that is left
LEAST_SECONDS = 20.0  # with less, a tool is not begun
NOT_RUN = 4  # the exit status if the machine lets no tool see its device
REFUSED = "Device not supported"  # what a tool says then, as on virtual machines without its driver
SLOW = ("racecheck", "synccheck")  # get tiny latents, as they follow every shared memory access
BACKENDS = ("cuda", "triton")
PATHS = {
    "cuda": ("two_launches", "cooperative", "cluster"),
    "triton": ("two_launches", "one_launch", "rows"),
}
INDEPENDENT = ("cluster", "rows")  # only for objectives whose transitions need no other
# A latent's elements and dtype. 601 is no multiple of a vector; 9000 take several tiles and chunks.
SIZES = {"tiny": ((601, "float32"),), "small": ((601, "float32"), (9000, "bfloat16"))}
FIRST_PORT, PORTS = 49152, 16
SECONDS = 100  # for everything together
FIRST_SHARE = 0.4  # the share of that for a run without a tool, in which Triton compiles


class Run(NamedTuple):
    """A process that makes a backend's calls, under a tool or under none."""

    backend: str
    tool: str | None

    def __str__(self) -> str:
        return f"{self.tool or 'the calls alone'} on {self.backend}"

    def command(self, sanitizer: str) -> list[str]:
        """The command line of the run.

        Of CUDA kernels, a tool checks only ours, by their name; Triton's have no name in common.
        initcheck checks all, as it has to see torch's kernels write what ours read.
        """
        size = "tiny" if self.tool in SLOW else "small"
        calls = [sys.executable, __file__, "--calls", self.backend, size]
        if self.tool is None:
            return calls
        options = ["--tool", self.tool, "--error-exitcode", "1", "--launch-timeout", "0"]
        options += ["--target-processes", "application-only"]  # leaves out Triton's assembler
        # torch asks the driver for functions that it may not have; those errors are no findings.
        options += ["--report-api-errors", "no"]
        # Each run has ports of its own, as all of them run at once.
        number = BACKENDS.index(self.backend) * len(TOOLS) + TOOLS.index(self.tool)
        options += ["--port", str(FIRST_PORT + number * PORTS)]
        if self.backend == "cuda" and self.tool != "initcheck":
            options += ["--kernel-name", "kns=guard_ops"]
        return [sanitizer, *options, *calls]


def calls(backend: str, size: str, device: str = "cuda") -> None:
    """The calls that run under the tools: a backend's ops by every path, at a size of SIZES.

    They are of three steps of four samples, as those of ``tests/device``, for which Triton has
    already compiled.
    """
    import torch

    import guard_ops as go

    generator = torch.Generator(device).manual_seed(0)
    schedule = go.SdeSchedule([1.0, 0.9, 0.75, 0.5, 0.2, 0.0], noise_level=0.7).to(device)
    coeffs, seeds = schedule[1:4], go.philox_seed(7, (3, 4), device)
    advantages = torch.tensor([1.0, -0.5, 0.2, 0.7], device=device)
    article, paper = go.GuardConfig.article(), go.GuardConfig.paper()
    for index, (numel, dtype) in enumerate(SIZES[size]):

        def latents(numel: int = numel, dtype: str = dtype) -> torch.Tensor:
            wide = torch.randn(3, 4, numel, device=device, generator=generator)
            return wide.to(getattr(torch, dtype))

        x, old = latents(), latents()
        step = go.sde_step(old, x, coeffs, seed=seeds)
        v = (old + 0.1 * latents()).requires_grad_()
        forms = [
            {"old_model_output": old, "seed": seeds},
            {"sample": x, "prev_sample": step.prev_sample, "old_mean": step.mean},
            {"sample": x, "prev_sample": step.prev_sample, "old_model_output": old},
            {"old_model_output": old, "noise": latents()},
        ]
        # To cuda a form is only an argument. To Triton it is one more kernel to compile, so Triton
        # runs one form at each size.
        for form in forms if backend == "cuda" else forms[index : index + 1]:
            go.log_ratio(v, coeffs=coeffs, **form).log_ratio.sum().backward()
            for path in PATHS[backend]:
                force(backend, path)
                config = paper if path in INDEPENDENT else article
                out = go.guard_loss(v, advantages=advantages, coeffs=coeffs, config=config, **form)
                (3 * out.loss).backward()
    if device == "cuda":
        torch.cuda.synchronize()


def force(backend: str, path: str) -> None:
    """Make the backend take a given path in its next losses."""
    if backend == "triton":
        os.environ["GUARD_OPS_TRITON_PATH"] = path
        return
    from guard_ops import _C

    _C.force_cuda_path(path)


def sanitizer() -> str | None:
    """The path of compute-sanitizer, on PATH or in a CUDA toolkit; None without one."""
    folders = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    beside = [f"{folder}/{inside}" for folder in folders if folder
              for inside in ("bin", "compute-sanitizer")]  # fmt: skip
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(beside)
    )


def missing() -> str:
    """Why nothing can be run; empty if it can."""
    return "" if sanitizer() else "compute-sanitizer is not on PATH, nor in CUDA_HOME"


def run_all(
    runs: Sequence[Run], tool: str, seconds: float, start: Callable[..., Any] = bounded.run
) -> tuple[list[Run], list[Run]]:
    """Does the runs side by side.

    Returns:
        Those with a finding, or that took over ``seconds``; and those that were refused the device.
    """

    def one(run: Run) -> tuple[int | None, str]:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "GUARD_OPS_BACKEND": run.backend,
        }
        if run.tool is not None:
            # without torch's cache each tensor is an allocation, whose bounds the tools check
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        command = run.command(tool)
        result: tuple[int | None, str] = start(
            command, seconds, ROOT, environment, output=subprocess.PIPE
        )
        return result

    failed, refused = [], []
    with ThreadPoolExecutor(len(runs) or 1) as pool:
        for run, (status, text) in zip(runs, pool.map(one, runs), strict=True):
            if run.tool is not None and REFUSED in text:
                refused.append(run)
                print(f"sanitize: {run}: not run, the tool is refused the device", flush=True)
                continue
            what = f"not ended after {seconds:.0f} s" if status is None else f"status {status}"
            print(f"sanitize: {run}: {'clean' if status == 0 else what}", flush=True)
            if status != 0:
                failed.append(run)
                print("\n".join(f"  {line}" for line in text.splitlines()[-40:]), flush=True)
    return failed, refused


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"default {SECONDS}")
    parser.add_argument("--calls", nargs=2, metavar=("BACKEND", "SIZE"), help="only the calls")
    options = parser.parse_args(arguments)
    if options.calls:
        calls(*options.calls)
        return 0
    end = time.monotonic() + options.seconds - 2 * bounded.GRACE_SECONDS
    import torch

    import guard_ops as go

    here = [name for name in BACKENDS if name in go.available_backends()]
    if not torch.cuda.is_available() or torch.version.cuda is None or not here:
        print("sanitize: nothing was run, there is no NVIDIA GPU that a backend runs on here")
        return 0
    tool = sanitizer()
    if tool is None:
        print(f"sanitize: nothing was run, {missing()}")
        return 0
    failed, _ = run_all([Run(name, None) for name in here], tool, FIRST_SHARE * options.seconds)
    left = [name for name in here if Run(name, None) not in failed]
    refused: list[Run] = []
    done: list[Run] = []
    for first in range(0, len(TOOLS), TOGETHER):
        runs = [Run(name, kind) for name in left for kind in TOOLS[first : first + TOGETHER]]
        seconds = end - time.monotonic()
        if refused or seconds < LEAST_SECONDS:
            why = "refused the device" if refused else "no time left"
            print(f"sanitize: not run, {why}: {', '.join(map(str, runs))}")
            continue
        found, turned_away = run_all(runs, tool, seconds)
        failed, refused = failed + found, refused + turned_away
        done += [run for run in runs if run not in turned_away]
    if len(left) < len(BACKENDS):
        rest = [name for name in BACKENDS if name not in left]
        print(f"sanitize: not under any tool: {', '.join(rest)}")
    clean = f"clean: {', '.join(str(run) for run in done if run not in failed) or 'nothing'}"
    print(f"sanitize: {'failed: ' + ', '.join(map(str, failed)) if failed else clean}")
    if failed:
        return 1
    return 0 if done else NOT_RUN


if __name__ == "__main__":
    sys.exit(main())
