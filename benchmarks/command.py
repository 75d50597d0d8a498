"""``guard-ops bench``: the suites in one process, as a table, a file, plots and a verdict."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from guard_ops.trainer.extras import require
from guard_ops.trainer.progress import progress_bar

from . import accuracy, cases, compare, console, results, step_share, suite
from .options import SUITES
from .results import Row
from .workloads import CI, Workload, named

SECONDS = {"workloads": 2.2, "ops": 0.35}  # how long a race takes, without compilation
ACCURACY_BATCH = 32

Update = Callable[[int, str], None]


def run(options: Namespace) -> int:
    """Measure, print, write; returns 1 if ``--compare`` finds something slower.

    Raises:
        ValueError: an option cannot be followed. That is found out before anything is measured,
            which takes minutes.
        ModuleNotFoundError: a package of the extra ``bench`` is missing; likewise.
    """
    workloads = named(options.workload)
    backends = suite.choose_backends(options.backend)
    device = suite.choose_device(backends)
    if options.elements is not None and options.elements < 1:
        raise ValueError(f"`--elements` is {options.elements}; it needs >= 1")
    elements = options.elements or suite.ELEMENTS[device.type]
    require("rich", "bench")
    _check_written(options.json, options.plot)
    suites = [name for name in SUITES if name in options.suite]
    planned = plan(workloads, suites, elements, device)
    old = None
    if options.compare is not None:
        old = compare.load(options.compare)
        compare.check_machine(old, results.section([], device.type)["environment"])
        compare.check_common(old, planned, backends)
    found = measure(planned, suites, workloads, backends, device)
    machine = {name: results.section(rows, device.type) for name, rows in found.items()}
    console.show(machine)
    if options.json is not None:
        results.write(options.json, machine)
        print(f"numbers: {options.json}")
    if options.plot is not None:
        from . import plots

        for path in plots.draw(machine, options.plot):
            print(f"plot: {path}")
    return 0 if old is None else _compare(old, found, planned, backends, device)


def _check_written(numbers: Path | None, plots: Path | None) -> None:
    """Whether ``--json`` and ``--plot`` will be able to write."""
    folders = []
    if numbers is not None:
        if numbers.is_dir():
            raise ValueError(f"`--json` is {numbers}, a folder; it needs the name of a file")
        folders.append((numbers.parent, numbers))
    if plots is not None:
        if plots.exists() and not plots.is_dir():
            raise ValueError(f"`--plot` is {plots}, a file; it needs the name of a folder")
        require("matplotlib", "bench")
        folders.append((plots if plots.is_dir() else plots.parent, plots))
    for folder, path in folders:
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder} to write {path.name} into")
        if not os.access(folder, os.W_OK):
            raise ValueError(f"{folder} cannot be written into")


def plan(
    workloads: Sequence[Workload], suites: Sequence[str], elements: int, device: torch.device
) -> dict[str, list[cases.Case]]:
    """Suite -> its races; the ops run on ``ci``, or on the first workload asked for."""
    every_chain = device.type == "cuda"
    planned = {}
    if "workloads" in suites:
        planned["workloads"] = list(cases.workload_cases(workloads, elements, every_chain))
    if "ops" in suites:
        planned["ops"] = list(cases.op_cases(CI if CI in workloads else workloads[0], elements))
    return planned


def measure(
    planned: dict[str, list[cases.Case]],
    suites: Sequence[str],
    workloads: Sequence[Workload],
    backends: Sequence[str],
    device: torch.device,
) -> dict[str, list[Row]]:
    """Suite -> its rows, under a progress bar."""
    found: dict[str, list[Row]] = {}
    for name, races in planned.items():
        with progress_bar(name, len(races)) as update:
            found[name] = _run(races, SECONDS[name], backends, device, update)
    if "accuracy" in suites:
        workload = (CI if CI in workloads else workloads[0]).with_batch(ACCURACY_BATCH)
        todo = [(dtype, drift) for dtype in cases.DTYPES for drift in accuracy.DRIFTS]
        with progress_bar("accuracy", len(todo)) as update:
            found["accuracy"] = []
            for done, (dtype, drift) in enumerate(todo):
                rows = accuracy.measure_accuracy(
                    workload, dtype, drift, backend=backends[0], device=device
                )
                found["accuracy"] += [results.accuracy_row(row) for row in rows]
                update(done + 1, "")
    if "share" in suites:
        with progress_bar("share of a step", len(step_share.MODELS)) as update:
            found["share"] = step_share.measure_all(backends[0], device, update)
    return found


def _run(
    races: Sequence[cases.Case],
    seconds: float,
    backends: Sequence[str],
    device: torch.device,
    update: Update,
) -> list[Row]:
    rows: list[Row] = []
    for done, case in enumerate(races):
        update(done, case.name)
        rows += suite.run_case(case, backends, device, seconds)
    update(len(races), "")
    return rows


def _compare(
    old: compare.Saved,
    found: dict[str, list[Row]],
    planned: dict[str, list[cases.Case]],
    backends: Sequence[str],
    device: torch.device,
) -> int:
    """Print the verdicts; what looks changed is timed again, and counts only if it does so twice.

    Returns:
        1 if something is slower.
    """
    verdicts: list[compare.Verdict] = []
    for name, races in planned.items():
        before = old.get(name, {"rows": []})["rows"]
        first = compare.verdicts(before, found[name])
        changed = {v.case for v in first if v.changed}
        again = [case for case in races if any(case.name in key for key in changed)]
        if again:
            with progress_bar(f"{name}, once more", len(again)) as update:
                rows = _run(again, 2 * SECONDS[name], backends, device, update)
            first = compare.confirmed(first, compare.verdicts(before, rows))
        verdicts += first
    return console.show_verdicts(verdicts)
