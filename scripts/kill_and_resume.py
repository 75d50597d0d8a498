"""Kills ``guard-ops train`` at random moments and resumes it: does every run end in the same bits?

    python scripts/kill_and_resume.py --kills 200

One run is never interrupted. Others, in folders of their own, are killed (SIGKILL) again and again:
at a random moment of their work, or while a checkpoint is being written. Each is then started with
``resume=true`` until it ends, and what it leaves (weights, their average, optimizer, generators,
metrics) is compared with the first run's, bit by bit. A process that warns or fails on the way is a
fault too. Everything random comes from ``--seed``, but how fast the machine is does not.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

PRETRAIN_STEPS, ITERATIONS = 40, 8
COMMAND = [
    sys.executable, "-m", "guard_ops", "train", "digits", "resume=true",
    f"pretrain_steps={PRETRAIN_STEPS}", f"iterations={ITERATIONS}",
    "checkpoint_every=1", "evaluate_every=4",
]  # fmt: skip
# The bits of a matrix product depend on the number of threads.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
PATIENCE = 600.0  # seconds for one process; it takes ten
PRETRAINED = "pretrained.safetensors"
PHASES = ("starting", "pretraining", "training", "saving")


class Outcome(NamedTuple):
    """What became of one run."""

    run: int
    phases: list[str]  # what it was doing at each kill
    wrong: list[str]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=at_least_one, default=200, help="at least; default: 200")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: 0")
    parser.add_argument("--jobs", type=at_least_one, default=2, help="runs at a time; default: 2")
    options = parser.parse_args(arguments)
    root, equal = Path(tempfile.mkdtemp(prefix="kill-and-resume-")), False
    try:
        equal = kill_runs(root, options.kills, options.seed, options.jobs)
    finally:
        if equal:
            shutil.rmtree(root)
        else:
            print(f"what the runs have left is kept: {root}", flush=True)
    return 0 if equal else 1


def at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}; it needs >= 1")
    return number


def kill_runs(root: Path, kills: int, seed: int, jobs: int) -> bool:
    """Whether all runs are equal; after a fault no other is begun."""
    started = time.monotonic()
    pace = uninterrupted(root / "whole")
    print(f"without a kill: {pace.whole:.1f} s of work; now {kills} kills", flush=True)
    print(f"{'run':>4}  {'kills':>5}  {'  '.join(PHASES)}  result", flush=True)
    killed: collections.Counter[str] = collections.Counter()
    runs = faults = 0
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        pending: set[concurrent.futures.Future[Outcome]] = set()
        while pending or (killed.total() < kills and not faults):
            while len(pending) < jobs and killed.total() < kills and not faults:
                runs += 1
                moments = random.Random(f"{seed} {runs}")
                pending.add(pool.submit(one_run, root, runs, moments, pace))
            done, pending = concurrent.futures.wait(pending, return_when="FIRST_COMPLETED")
            for future in done:
                outcome = future.result()
                killed.update(outcome.phases)
                faults += bool(outcome.wrong)
                report(outcome)
    print(f"{runs} runs, {killed.total()} kills ({', '.join(f'{killed[p]} {p}' for p in PHASES)}) "
          f"in {time.monotonic() - started:.0f} s: "
          + (f"{faults} RUNS DIFFER" if faults else "every run equal bit by bit"))  # fmt: skip
    return not faults


def report(outcome: Outcome) -> None:
    run, phases, wrong = outcome
    counts = "  ".join(f"{phases.count(phase):>{len(phase)}}" for phase in PHASES)
    print(f"{run:>4}  {len(phases):>5}  {counts}  {'; '.join(wrong) or 'equal'}", flush=True)


class Pace(NamedTuple):
    """Seconds of work, from the moment when a process has locked its folder."""

    pretraining: float
    whole: float


def uninterrupted(out: Path) -> Pace:
    """The run that is never killed."""
    process = start(out)
    wait_for_work(process, out)
    began = time.monotonic()
    while process.poll() is None and not (out / PRETRAINED).exists():
        time.sleep(0.005)
    pretraining = time.monotonic() - began
    if wrong := ended(process, out):
        raise SystemExit(f"the run without a kill failed: {wrong}")
    return Pace(pretraining, time.monotonic() - began)


def one_run(root: Path, run: int, moments: random.Random, pace: Pace) -> Outcome:
    """Kill a run until it comes to its end."""
    out = root / f"killed-{run}"
    phases: list[str] = []
    while True:
        pretrained = (out / PRETRAINED).exists()
        # What is left when a process is killed is done in several such steps.
        after = moments.uniform(0, 0.4 * pace.whole if pretrained else pace.pretraining)
        saving = moments.random() < 0.3
        instant = moments.uniform(0, 0.03)
        left = writing(out)  # what a kill before this one has left
        process = start(out)
        if not wait_for_work(process, out):
            break
        until = time.monotonic() + after
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        until = time.monotonic() + PATIENCE
        while saving and process.poll() is None and not writing(out) - left:
            if time.monotonic() > until:
                process.kill()
                process.wait()
                return Outcome(run, phases, [f"no checkpoint was begun in {PATIENCE:.0f} s"])
            time.sleep(0.0005)
        if saving:
            time.sleep(instant)
        process.kill()
        if process.wait() != -signal.SIGKILL:
            break
        phases.append(phase(out, left))
        if wrong := complaints(out):
            return Outcome(run, phases, wrong)
    wrong = ended(process, out) or differences(root / "whole", out)
    return Outcome(run, phases, wrong)


def start(out: Path) -> subprocess.Popen[bytes]:
    out.mkdir(exist_ok=True)
    with out.with_suffix(".log").open("wb") as log:
        return subprocess.Popen([*COMMAND, f"out={out}"], env=ENVIRONMENT, stdout=log, stderr=log)


def wait_for_work(process: subprocess.Popen[bytes], out: Path) -> bool:
    """Wait until the process has locked its folder; False if it has ended before."""
    lock, until = out / "run.lock", time.monotonic() + PATIENCE
    while process.poll() is None:
        if lock.exists() and lock.read_text().startswith(f"process {process.pid} "):
            return True
        if time.monotonic() > until:
            process.kill()
        time.sleep(0.005)
    return False


def writing(out: Path) -> set[tuple[Path, int]]:
    """The checkpoints that are half written, each with its inode."""
    found = set()
    for path in out.glob("*/.writing-*"):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            found.add((path, path.stat().st_ino))
    return found


def phase(out: Path, left: set[tuple[Path, int]]) -> str:
    """What a killed process was doing, by what it left."""
    if writing(out) - left:
        return "saving"
    if list(out.glob("checkpoints/iteration-*")):
        return "training"
    return "pretraining" if list(out.glob("pretraining/iteration-*")) else "starting"


def ended(process: subprocess.Popen[bytes], out: Path) -> list[str]:
    """What is wrong with how a process came to its end."""
    try:
        status = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return [f"it took longer than {PATIENCE:.0f} s"]
    return [f"exit status {status}: {log(out)[-300:]}"] if status else complaints(out)


def complaints(out: Path) -> list[str]:
    """Warnings and errors that a process has printed."""
    lines = [
        line for line in log(out).splitlines() if "Warning: guard_ops" in line or "Error" in line
    ]
    return lines[:1]


def log(out: Path) -> str:
    return out.with_suffix(".log").read_text(errors="replace")


def differences(a: Path, b: Path, iteration: int = ITERATIONS) -> list[str]:
    """Names of what two finished runs do not share to the bit."""
    from safetensors import safe_open

    found = []
    folder = Path("checkpoints") / f"iteration-{iteration:06d}"
    for name in ("model", "ema", "optimizer"):
        path = folder / f"{name}.safetensors"
        with safe_open(a / path, "pt") as left, safe_open(b / path, "pt") as right:
            if not left.keys() or set(left.keys()) != set(right.keys()):
                found.append(f"{name}: other tensors")
                continue
            for key in set(left.keys()):
                x, y = left.get_tensor(key), right.get_tensor(key)
                if x.dtype != y.dtype or not x.equal(y):
                    found.append(f"{name}: {key}")
    states = [json.loads((x / folder / "state.json").read_text()) for x in (a, b)]
    found += [
        f"state: {key}"
        for key in states[0].keys() | states[1].keys()
        if key != "metrics" and states[0].get(key) != states[1].get(key)
    ]
    texts = [(x / "metrics.jsonl").read_text() for x in (a, b)]
    if lines(texts[0]) != lines(texts[1]) or lines(states[1]["metrics"]) != lines(texts[1]):
        found.append("metrics")
    if [line["iteration"] for line in lines(texts[1])] != list(range(1, iteration + 1)):
        found.append("metrics: iterations")
    return found


def lines(text: str) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl`` but for the clock."""
    return [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in text.splitlines()]


if __name__ == "__main__":
    sys.exit(main())
