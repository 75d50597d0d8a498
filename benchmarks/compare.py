"""Has anything become slower since an earlier run? Answers within what the runs' noise allows."""

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
LEAST = 0.05  # smaller differences between two processes are code and data layout
FIELDS = ("contender", "form", "milliseconds", "noise", "scatter", "shape")

Saved = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """One kernel then and now. ``change`` is relative: 0.5 is half as much time again."""

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
        ValueError: it cannot be read or holds no timings; says which JSON files stand beside it.
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
    """Times of two machines say nothing about a commit.

    Raises:
        ValueError: the earlier run was on another machine, or with other threads.
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
    """One for each kernel of guard_ops that both runs timed on the same shape.

    The change counts only as far as time says it and time against the memory copy of the same race
    says it: a machine that runs slower as a whole today is no regression, nor is a copy that
    happened to run fast. Its threshold is what the two runs differ by for no reason: each one's
    noise within its race, and the scatter between its own reruns on fresh tensors.
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
    """(kernel's row, its race's copy's row) of every backend of guard_ops."""
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
    """``first``, with a change that was timed again shown at the smaller of its two sizes.

    It is no change where the two runs differ in its direction.
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
