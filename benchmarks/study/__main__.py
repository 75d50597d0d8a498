"""``python -m benchmarks.study``: make the runs that are missing, and write docs/study.md.

Runs are made one a process and one thread each; a finished one is not made again, and one that was
killed starts anew. ``--check`` makes nothing and exits with 1 if the page is not what the saved
runs say.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import groupby
from pathlib import Path

from .runs import FIRST_SEED, Spec, finished, perform, specs
from .tasks import TASKS, Task

ROOT = Path(__file__).parents[2]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "study", help="of the runs")
    parser.add_argument("--seeds", type=int, default=5, help="how many; default: 5")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only-runs", action="store_true", help="write no page")
    parser.add_argument("--check", action="store_true", help="only say whether the page is current")
    options = parser.parse_args()
    if not options.check:
        make_runs(options.out, options.seeds, options.processes)
    if options.only_runs:
        return 0
    from .page import save

    return save(None if options.check else options.out, ROOT / "docs", check=options.check)


def make_runs(out: Path, seeds: int, processes: int) -> None:
    """Make the runs that ``out`` does not have."""
    numbers = range(FIRST_SEED, FIRST_SEED + seeds)
    wanted = [spec for spec in specs(numbers) if not finished(spec, out)]
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes, which are as many as there are cores
    with ProcessPoolExecutor(processes) as pool:
        for seed, group in groupby(wanted, key=lambda spec: spec.seed):
            some = list(group)
            tasks = dict.fromkeys(spec.task for spec in some)
            for done in [pool.submit(_pretrain, task, seed, out) for task in tasks]:
                done.result()
            for spec, seconds in [(spec, pool.submit(_run, spec, out)) for spec in some]:
                print(f"{spec.name}: {seconds.result():.0f} s", flush=True)


def _pretrain(task: str, seed: int, out: Path) -> None:
    _task(task).policy(out / "pretrained", seed)


def _run(spec: Spec, out: Path) -> float:
    return perform(spec, _task(spec.task), out / "pretrained", out)


@cache
def _task(name: str) -> Task:
    import torch

    torch.set_num_threads(1)
    return TASKS[name]()


if __name__ == "__main__":
    sys.exit(main())
