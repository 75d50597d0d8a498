"""Finds what has become slower since an earlier run, as far as the noise of the runs allows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from guard_ops.backends import ORDER

from .cases import COPY, Case
from .results import Row
from .tables import case_key

SECTIONS = ("workloads", "ops")
SAME_MACHINE = ("device", "cpu", "cores", "threads")
LEAST = 0.05  # smaller differences between two processes come from where code and data lie

Saved = dict[str, dict[str, Any]]


def _is_text(x: object) -> bool:
    return isinstance(x, str)


def _is_number(x: object) -> bool:
    """Not NaN, which json reads too, nor an integer that no float holds."""
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= sys.float_info.max


def _is_positive(x: Any) -> bool:
    return _is_number(x) and x > 0


def _is_spread(x: Any) -> bool:
    return _is_number(x) and x >= 0


def _is_shape(x: object) -> bool:
    return isinstance(x, list) and all(type(n) is int and n > 0 for n in x)


TEXTS = ("workload", "op", "stage", "form", "objective", "dtype", "case", "contender")
# What is read of a row: what it needs to be, and whether it is that.
FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(TEXTS, ("a text", _is_text)),
    "milliseconds": ("a number > 0", _is_positive),
    "noise": ("a number >= 0", _is_spread),
    "scatter": ("a number >= 0", _is_spread),
    "shape": ("a list of whole numbers > 0", _is_shape),
}


@dataclass(frozen=True)
class Verdict:
    """A kernel then and now. ``change`` is relative: 0.5 means that it takes 1.5 times as long."""

    name: str
    case: tuple[object, ...]
    change: float
    threshold: float

    @property
    def slower(self) -> bool:
        return self.change > self.threshold

    @property
    def faster(self) -> bool:
        return self.change < -self.threshold / (1 + self.threshold)

    @property
    def changed(self) -> bool:
        return self.slower or self.faster

    def __str__(self) -> str:
        if self.slower:
            return f"slower by {self.change:.0%}"
        if self.faster:
            return f"faster by {-self.change:.0%}"
        return "no change"


def load(path: Path) -> Saved:
    """What ``guard-ops bench --json`` (or ``make bench``) wrote.

    Raises:
        ValueError: it cannot be read or has no timings; the message names the JSON files beside it.
    """
    try:
        saved = json.loads(path.read_text())
        if not isinstance(saved, dict):
            raise ValueError("it is no object of sections")
        if not any(section in saved for section in SECTIONS):
            raise ValueError(f"it has none of the sections {', '.join(SECTIONS)}")
        for name in SECTIONS:
            if name in saved:
                _check_section(name, saved[name])
        return saved
    except (OSError, ValueError, RecursionError) as error:
        folder = path.parent
        beside = sorted(p.name for p in folder.glob("*.json")) if folder.is_dir() else []
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(
            f"cannot compare with {path}: {why}; it needs a file that `guard-ops bench --json` "
            f"wrote; JSON files in {folder}: {', '.join(beside) or 'none'}"
        ) from None


def _check_section(name: str, section: Any) -> None:
    """Whether :func:`check_machine` and :func:`verdicts` can take a section.

    Raises:
        ValueError: they cannot; the message names the row, counted from 0, and what is wrong.
    """
    if not isinstance(section, dict) or not isinstance(section.get("rows"), list):
        raise ValueError(f"its section {name} has no list of rows")
    if not isinstance(section.get("environment"), dict):
        raise ValueError(f"its section {name} does not say on which machine (environment)")
    rows = section["rows"]
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} of {name} is no object")
        for field, (needed, fits) in FIELDS.items():
            if not fits(row.get(field)):
                got = f"{row[field]!r:.60}" if field in row else "missing"
                raise ValueError(f"{field!r} of row {number} of {name} is {got}; it needs {needed}")
    copies = {case_key(row) for row in rows if row["contender"] == COPY}
    for number, row in enumerate(rows):
        if row["contender"] in ORDER and case_key(row) not in copies:
            raise ValueError(f"row {number} of {name}, {_name(row)}, has no {COPY} of its race")


def check_common(
    old: Saved, planned: Mapping[str, Iterable[Case]], backends: Sequence[str]
) -> None:
    """Refuses a run of ``planned`` on ``backends`` that would have nothing to compare.

    Raises:
        ValueError: the earlier run timed none of its kernels on the same shapes.
    """
    for section, races in planned.items():
        timed = {
            (row["case"], tuple(row["shape"]))
            for row in old.get(section, {"rows": []})["rows"]
            if row["contender"] in backends
        }
        if any((case.name, case.workload.shape) in timed for case in races):
            return
    raise ValueError(
        "nothing to compare: the earlier run timed none of these kernels on these shapes"
    )


def check_machine(old: Saved, environment: dict[str, Any]) -> None:
    """Refuses times of another machine, which say nothing about a commit.

    Raises:
        ValueError: the earlier run was on another machine, or with another number of threads.
    """
    for section in SECTIONS:
        before = old[section]["environment"] if section in old else environment
        for name in SAME_MACHINE:
            if before.get(name) != environment.get(name):
                raise ValueError(
                    f"cannot compare: {section} of the earlier run has {name} "
                    f"{before.get(name)!r}, this one {environment.get(name)!r}"
                )


def verdicts(old: Iterable[Row], new: Iterable[Row]) -> list[Verdict]:
    """A verdict on each kernel of guard_ops that both runs timed on the same shape.

    Its change is the smaller of two: that of its time, and that of its time relative to the memory
    copy in the same race; none if they disagree in direction. So neither a machine that is slower
    as a whole today counts, nor a copy that happened to be fast. Its threshold is by how much the
    runs differ for no reason: each one's noise within its race, and the scatter between its own
    reruns on fresh tensors.
    """
    before, after = _kernels(old), _kernels(new)
    out = []
    for key, (row, copy) in after.items():
        if key not in before or before[key][0]["shape"] != row["shape"]:
            continue
        was, was_copy = before[key]
        time = row["milliseconds"] / was["milliseconds"]
        relative = time * was_copy["milliseconds"] / copy["milliseconds"]
        threshold = LEAST + sum(r["noise"] + r["scatter"] for r in (was, row))
        same_way = (time > 1) == (relative > 1)
        change = min(time - 1, relative - 1, key=abs) if same_way else 0.0
        out.append(Verdict(_name(row), case_key(row), change, threshold))
    return out


def _kernels(rows: Iterable[Row]) -> dict[tuple[object, ...], tuple[Row, Row]]:
    """For every kernel of guard_ops: its row, and the row of the memory copy in the same race."""
    rows = list(rows)
    copies = {case_key(row): row for row in rows if row["contender"] == COPY}
    return {
        (*case_key(row), row["contender"], row["form"]): (row, copies[case_key(row)])
        for row in rows
        if row["contender"] in ORDER
    }


def _name(row: Row) -> str:
    parts = [row["workload"], row["op"], row["stage"], row["form"], row["objective"], row["dtype"]]
    return " ".join(part for part in parts if part != "-") + f" on {row['contender']}"


def confirmed(first: list[Verdict], again: list[Verdict]) -> list[Verdict]:
    """``first``, where a change that was timed again is the smaller of the two.

    It is no change if the two runs differ in its direction.
    """
    repeated = {(v.name, v.case): v for v in again}

    def settled(v: Verdict) -> Verdict:
        second = repeated.get((v.name, v.case))
        if second is None or not v.changed:
            return v
        if (second.change > 0) != (v.change > 0):
            return replace(v, change=0.0)
        return min(v, second, key=lambda x: abs(x.change))

    return [settled(v) for v in first]
