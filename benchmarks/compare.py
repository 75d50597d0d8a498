"""Finds what has become slower since an earlier run, as far as the noise of the runs allows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from guard_ops.backends import ORDER

from .cases import COPY
from .results import Row
from .tables import case_key

SECTIONS = ("workloads", "ops")
SAME_MACHINE = ("device", "cpu", "cores", "threads")
LEAST = 0.05  # smaller differences between two processes come from where code and data lie
FIELDS = ("contender", "form", "milliseconds", "noise", "scatter", "shape")

Saved = dict[str, dict[str, Any]]


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
        for section in SECTIONS:
            for row in saved.get(section, {"rows": []})["rows"]:
                case_key(row)
                [row[name] for name in FIELDS]
        if not any(section in saved for section in SECTIONS):
            raise ValueError(f"it has none of the sections {', '.join(SECTIONS)}")
        return dict(saved)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        folder = path.parent
        beside = sorted(p.name for p in folder.glob("*.json")) if folder.is_dir() else []
        why = f"no {error} in it" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"cannot compare with {path}: {why}; it needs a file that `guard-ops bench --json` "
            f"wrote; JSON files in {folder}: {', '.join(beside) or 'none'}"
        ) from None


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
