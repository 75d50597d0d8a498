"""How many cases there are, where their choice comes from, and how many each contender ran."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, settings

# `make fuzz` sets these; `make test` always runs the same cases.
CASES = int(os.environ.get("GUARD_OPS_FUZZ_CASES", "0"))
HABIT = 1000
_counts: Counter[tuple[str, str, str]] = Counter()


def examples(share: float) -> Callable[[Any], Any]:
    """Settings of a test that gets this share of all cases."""
    return settings(
        max_examples=max(1, round(share * (CASES or HABIT))),
        derandomize=not CASES,
        deadline=None,
        database=None,
        print_blob=True,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


def tally(area: str, contender: str, decided: bool = True) -> None:
    """Counts a case of an area that a contender ran."""
    _counts[area, contender, "cases" if decided else "undecided"] += 1


def taken() -> list[list[Any]]:
    """What was counted since the last time, as plain lists, which pytest-xdist can send."""
    out = [[*key, n] for key, n in _counts.items()]
    _counts.clear()
    return out
