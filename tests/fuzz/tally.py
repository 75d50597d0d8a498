"""How many cases a test gets, where their choice comes from, and what was counted of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, settings

# `make fuzz` asks for a number and a seed; without one, as in `make test`, the same cases run.
ASKED = int(os.environ.get("GUARD_OPS_FUZZ_CASES", "0"))
CASES = ASKED or 400
_counts: Counter[tuple[str, str]] = Counter()


def examples(share: float) -> Callable[[Any], Any]:
    """Settings of a test that gets this share of all cases; the shares add up to 1."""
    return settings(
        max_examples=max(1, round(share * CASES)),
        derandomize=not ASKED,
        deadline=None,
        database=None,
        print_blob=True,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


def tally(area: str, *ran: str, decided: bool = True) -> None:
    """Counts a case of an area, and who ran it or how it ended."""
    _counts[area, "cases" if decided else "undecided"] += 1
    for name in ran:
        _counts[area, name] += 1


def absent(name: str) -> None:
    """Notes something that this machine should have and has not."""
    _counts["absent", name] = 1


def taken() -> list[list[Any]]:
    """What was counted since the last time, as plain lists, which pytest-xdist can send."""
    out = [[*key, n] for key, n in _counts.items()]
    _counts.clear()
    return out
