"""Which combinations of a test's arguments are run every time, and which by ``make test-all``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import pytest


def values_first(cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """The cases as parameters; those that add no value are marked ``slow_suite``.

    For what takes seconds a case and does not look into the kernels.
    """
    return covering(1, cases, lambda *case: case)


def pairs_first(
    cases: Iterable[tuple[Any, ...]],
    features: Callable[..., tuple[Hashable, ...]] = lambda *case: case,
) -> list[Any]:
    """The cases as parameters; those that add no pair of values are marked ``slow_suite``.

    What an argument's value does wrong shows in every case that has it, and what two do wrong
    together in every case that has both, so that every pair is in ``make test``; what takes three
    waits for ``make test-all``. ``features``: a case's arguments are these values together.
    """
    return covering(2, cases, features)


def covering(
    count: int,
    cases: Iterable[tuple[Any, ...]],
    features: Callable[..., tuple[Hashable, ...]],
) -> list[Any]:
    """As parameters, a few of the cases unmarked that have whatever ``count`` values meet."""
    cases = list(cases)
    meet = [set(itertools.combinations(enumerate(features(*case)), count)) for case in cases]
    missing, chosen = set().union(*meet), set()
    while missing:
        best = max(range(len(cases)), key=lambda n: len(meet[n] & missing))
        chosen.add(best)
        missing -= meet[best]
    return [
        pytest.param(*case, marks=() if n in chosen else pytest.mark.slow_suite)
        for n, case in enumerate(cases)
    ]
