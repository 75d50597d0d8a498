"""Speed on a GPU: graph replay timed with events, beside a copy of the same run.

    python -m benchmarks.device     # prints the table, writes benchmarks/results/<device>.json

Every call computes the loss of a batch and its gradient, as in ``test_speed.py``. It is timed as
graph replay (the GPU's own time, without Python's), on the same tensors and, where those would stay
in the cache, on tensors in turn that do not; and as it is called, which is what a trainer waits
for. Ours are also timed as ``guard_loss_and_grad``, which leaves out autograd's own kernels. The
plain chain and ``torch.compile`` of it are timed alike. ``share_of_copy`` counts the least bytes
there can be: every operand read once, the gradient written once. ``moved_share_of_copy`` counts
those that have to move: the article's objective needs every ratio before any gradient, and its
gradient's pass reads a batch that no chip holds from memory again.

What decides most comes first, each number is saved as soon as it is there, and what fails or hangs
takes nothing with it but its own row (:mod:`benchmarks.isolated`). A second run on the same device
with the same sources keeps the rows of the first and measures those that it lacks.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

import guard_ops as go
from guard_ops.backends import select

from . import contenders, gpu_timing, isolated, measure, results
from .cases import COPY
from .device_bounds import DTYPES, LARGE, OBJECTIVES, SMALL, bounds
from .measure import Call
from .workloads import bytes_in_two_passes, bytes_per_element

WORKLOADS = {workload.name: workload for workload in (LARGE, SMALL)}
CHAINS = ("eager", "torch.compile")
CHAINED = ("bfloat16", "article")  # the dtype and the objective that these are measured in
# The paths of each backend, and those that only objectives whose rows are independent can take.
PATHS = {
    "triton": ("two_launches", "one_launch", "rows"),
    "cuda": ("two_launches", "cooperative", "cluster"),
}
INDEPENDENT = ("rows", "cluster")
REFUSED = {(LARGE.name, "cluster")}  # a row of it is more than a cluster's blocks hold
COPY_BYTES = 2 << 30  # half of them read, half written
# The most seconds that a job may take. What hangs once is not tried again by the same path.
JOB_SECONDS = {"triton": 40.0, "torch.compile": 90.0}  # these compile
OTHER_SECONDS = 20.0
FAILURES = 3  # after so many, no more of a contender is tried
# What has to be the same for the rows of an earlier run to be kept.
SAME = ("device", "sources", "torch", "triton", "cuda", "hip")
MISSED = 3  # the exit status if everything ran, but not fast enough
MARGIN_SECONDS = 5.0  # kept to print the end of the table


class Job(NamedTuple):
    """One row: who computes what. ``path`` is "chosen" if the backend is to choose it."""

    workload: str
    dtype: str
    contender: str
    form: str
    objective: str
    path: str = "chosen"


COPIED = Job("-", "-", COPY, "-", "-")


def jobs(backends: Sequence[str]) -> list[Job]:
    """Everything that is measured, what decides most first.

    That is what the bounds look at, then CUDA's paths (which decide the thresholds between them),
    the forms that make noise, Triton's paths and the other form; and last ``torch.compile``, each
    row of which takes as long as many of the others.
    """
    kinds = [(w, d, o) for w in WORKLOADS for d in DTYPES for o in OBJECTIVES]

    def mean(contender: str) -> list[Job]:
        return [Job(w, d, contender, "mean", o) for w, d, o in kinds]

    def forms(*names: str) -> list[Job]:
        return [Job(w, d, b, form, o) for w, d, o in kinds for b in backends for form in names]

    def paths(backend: str) -> list[Job]:
        return [
            Job(workload, dtype, backend, "mean", objective, path)
            for workload, dtype, objective in kinds
            for path in PATHS[backend]
            if objective == "paper" or path not in INDEPENDENT
            if (workload, path) not in REFUSED
        ]

    def chain(name: str) -> list[Job]:
        return [job for job in mean(name) if (job.dtype, job.objective) == CHAINED]

    bounded = [job for together in zip(*map(mean, backends), strict=True) for job in together]
    return [
        *bounded,
        *chain("eager"),
        *(paths("cuda") if "cuda" in backends else []),
        *forms("noise", "seeded"),
        *(paths("triton") if "triton" in backends else []),
        *forms("velocity"),
        *chain("torch.compile"),
    ]


def measured(job: Job) -> isolated.Answer:
    """What a row measures, without what follows from its bytes; runs in a process of its own."""
    if job == COPIED:
        source = torch.ones(COPY_BYTES // 2, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return {"bandwidth": COPY_BYTES / gpu_timing.timed(lambda: target.copy_(source))}
    workload, dtype = WORKLOADS[job.workload], DTYPES[job.dtype]
    sets = gpu_timing.sets_beyond_cache(workload.floor_bytes(job.form, dtype))
    answer: isolated.Answer = {}
    try:
        with running(job):
            calls = [call_of(job, rollout(job.workload, job.dtype, seed)) for seed in range(sets)]
            answer["as_called_microseconds"] = gpu_timing.timed(calls[0]) * 1e6
            answer["microseconds"] = gpu_timing.replayed(calls[:1]) * 1e6
            if job.contender == "cuda":
                answer["ran"] = _last_cuda_path()
            if job.contender not in CHAINS and job.path == "chosen":
                inputs = rollout(job.workload, job.dtype, 0)
                alone = contenders.loss_and_grad(inputs, job.form, job.objective)
                answer["loss_and_grad_microseconds"] = gpu_timing.replayed([alone]) * 1e6
            if sets > 1:
                answer["cold_microseconds"] = gpu_timing.replayed(calls) * 1e6
    except Exception as error:  # what was measured before the error is kept
        answer["error"] = isolated.first_line(error)
    return answer


@functools.lru_cache(maxsize=gpu_timing.SETS)
def rollout(workload: str, dtype: str, seed: int) -> contenders.Inputs:
    """Tensors on the GPU, made by plain PyTorch, so that no kernel is timed on another's errors."""
    with go.use_backend("reference"):
        return contenders.make_inputs(WORKLOADS[workload], DTYPES[dtype], seed=seed, device="cuda")


def call_of(job: Job, inputs: contenders.Inputs) -> Call:
    """Loss and gradient, as :mod:`benchmarks.contenders` has them."""
    if job.contender in CHAINS:
        return contenders.chain(
            inputs, job.objective, compiled=job.contender == "torch.compile", recompute=False
        )
    return contenders.ours(inputs, job.form, job.objective)


@contextmanager
def running(job: Job) -> Iterator[None]:
    """The job's backend and path, in use inside the block."""
    path = None if job.path == "chosen" else job.path
    forced = job.contender == "cuda" and path is not None
    if forced:
        _force_cuda_path(job.path)
    try:
        with (
            nullcontext() if job.contender in CHAINS else go.use_backend(job.contender),
            environment_variable("GUARD_OPS_TRITON_PATH", path),
        ):
            yield
    finally:
        if forced:
            _force_cuda_path("automatic")


def _force_cuda_path(name: str) -> None:
    from guard_ops import _C

    _C.force_cuda_path(name)


def _last_cuda_path() -> str:
    from guard_ops import _C

    return _C.last_cuda_path()


@contextmanager
def environment_variable(name: str, value: str | None) -> Iterator[None]:
    """The environment variable is set, or unset for None, inside the block."""
    before = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def row(job: Job, answer: isolated.Answer, copy: float | None) -> results.Row:
    """A job's row: what it is, what was measured, and how far that is from a copy's bandwidth."""
    workload, dtype = WORKLOADS[job.workload], DTYPES[job.dtype]
    out = {
        **job._asdict(),
        "shape": list(workload.shape),
        "bytes_per_element": bytes_per_element(job.form, dtype),
        **answer,
    }
    if job.contender in CHAINS:
        del out["path"]
    if copy and "microseconds" in answer:
        seconds = answer["microseconds"] / 1e6
        again = job.objective == "article" and workload == LARGE
        moved = (bytes_in_two_passes if again else bytes_per_element)(job.form, dtype)
        out["share_of_copy"] = workload.floor_bytes(job.form, dtype) / seconds / copy
        out["moved_share_of_copy"] = workload.numel * moved / seconds / copy
    return out


def device_backends() -> list[str]:
    """Backends with kernels for the GPU, the preferred one first."""
    found = []
    for name in go.available_backends():
        with go.use_backend(name):
            try:
                select(torch.device("cuda"))
            except (ValueError, RuntimeError):  # a RuntimeError: the backend cannot even be asked
                continue
        if name != "reference":
            found.append(name)
    return found


def environment() -> dict[str, Any]:
    """Device, driver, versions, date and commit."""
    known = measure.environment()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(query, capture_output=True, check=True, timeout=20)
        driver = asked.stdout.decode(errors="replace").split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "not installed"
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": version,
        "sources": results.sources(),
        **known,
    }


def save(
    rows: list[results.Row],
    copy: float | None,
    here: dict[str, Any],  # what environment() returned
    backends: Sequence[str],
    out: Path | None = None,
    folder: Path = results.FOLDER,
) -> Path:
    """``<device>.json``, in the form of :mod:`benchmarks.results`; its other sections stay."""
    known = {**here, "copy_gigabytes_per_second": copy / 1e9 if copy else None}
    section = {"environment": known, "rows": rows, "bounds_missed": bounds(rows, backends)}
    return results.put("device", section, folder, "cuda", out)


def earlier(
    todo: Sequence[Job], here: dict[str, Any], folder: Path = results.FOLDER
) -> dict[Job, results.Row]:
    """The rows of this device's file that are measured already, with the same sources."""
    section = results.known("device", folder, "cuda")
    there = section.get("environment", {})
    if any(there.get(name) != here.get(name) for name in SAME):
        return {}
    rows = [row for row in section.get("rows", []) if "error" not in row]
    known = {tuple(row.get(name, "chosen") for name in Job._fields): row for row in rows}
    return {job: known[job] for job in todo if job in known}


def line(found: results.Row) -> str:
    """A row as it is printed."""
    text = (
        f"{found['workload']:16} {found['dtype']:9} {found['contender']:13} {found['form']:9}"
        f" {found['objective']:8} {found.get('path', ''):13}"
    )
    if "microseconds" in found:
        text += f" {found['microseconds']:10.1f} us"
    if "share_of_copy" in found:
        text += f" {found['share_of_copy']:6.2f} of copy"
        text += f" ({found['moved_share_of_copy']:.2f} moved)"
    if "loss_and_grad_microseconds" in found:
        text += f" {found['loss_and_grad_microseconds']:10.1f} us without autograd"
    if "cold_microseconds" in found:
        text += f" {found['cold_microseconds']:10.1f} us cold"
    if "as_called_microseconds" in found:
        text += f" {found['as_called_microseconds']:10.1f} us as called"
    return text + (f" FAILED {found['error']}" if "error" in found else "")


def measure_all(
    todo: Sequence[Job],
    worker: isolated.Worker,
    deadline: float,  # on the clock of time.monotonic
) -> Iterator[tuple[Job, isolated.Answer]]:
    """The answers in turn, until the deadline.

    A path of a contender that hung once is not tried again, nor a contender after ``FAILURES``
    failures.
    """
    failures: Counter[str] = Counter()
    hung: set[tuple[str, str]] = set()
    for job in todo:
        left = deadline - time.monotonic()
        if left <= 0:
            return
        if failures[job.contender] >= FAILURES:
            yield job, {"error": f"not tried: {job.contender} failed {FAILURES} times"}
            continue
        if (job.contender, job.path) in hung:
            yield job, {"error": f"not tried: {job.contender} hung by the path {job.path}"}
            continue
        most = JOB_SECONDS.get(job.contender, OTHER_SECONDS)
        answer = worker.ask(job, min(most, left))
        failures[job.contender] += "error" in answer
        if most <= left and answer.get("error", "").startswith(isolated.HUNG):
            hung.add((job.contender, job.path))
        yield job, answer


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; returns ``MISSED`` if a bound is missed, or a number for it is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="stop after these; default 600")
    parser.add_argument("--out", type=Path, help="a folder that gets the file too, row by row")
    parser.add_argument("--again", action="store_true", help="measure what an earlier run has, too")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.seconds - MARGIN_SECONDS
    if not torch.cuda.is_available():
        print("no GPU: nothing measured", file=sys.stderr)
        return 0
    backends, here = device_backends(), environment()
    planned, copy = jobs(backends), None
    kept = {} if options.again else earlier(planned, here)
    rows: list[results.Row] = list(kept.values())
    if kept:
        print(f"{len(kept)} of {len(planned)} rows are kept from an earlier run")
    todo = [COPIED, *(job for job in planned if job not in kept)]
    with isolated.Worker(measured) as worker:
        for job, answer in measure_all(todo, worker, deadline):
            if job == COPIED:
                copy = answer.get("bandwidth")
                speed = f"{copy / 1e9:.0f} GB/s" if copy else f"not measured, {answer['error']}"
                print(f"{here['device']}: copy, read and written: {speed}", flush=True)
                continue
            rows.append(row(job, answer, copy))
            print(line(rows[-1]), flush=True)
            save(rows, copy, here, backends, options.out)
    print(f"wrote {save(rows, copy, here, backends, options.out)}" if rows else "wrote nothing")
    if len(rows) < len(planned):
        print(f"{len(planned) - len(rows)} of {len(planned)} rows not measured: no time left")
    missed = bounds(rows, backends)
    print("\n".join(f"MISSED {text}" for text in missed) or "every bound met")
    return MISSED if missed else 0


if __name__ == "__main__":
    sys.exit(main())
