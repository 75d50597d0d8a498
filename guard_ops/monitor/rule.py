"""When a run over-optimizes: gold has fallen for certain while the reward rose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

ERRORS = 3.0  # paired standard errors by which gold has to be below its best
DIVERSITY = 0.7  # of the start, below which it is an early warning


class Reading(NamedTuple):
    """An evaluation: n samples of the held-out prompts, the same prompts and noise each time."""

    iteration: int
    proxy: float  # the reward that is trained on, on average
    gold: Sequence[float]  # of each sample, in the same order each time
    diversity: float | None = None

    @property
    def mean(self) -> float:
        """Of gold."""
        return math.fsum(self.gold) / len(self.gold)


class Verdict(NamedTuple):
    """What the readings say until the last one."""

    best: int  # the iteration with the highest gold
    since: int | None  # the iteration since which it over-optimizes; None: it does not
    drop: float  # gold at the best less gold now
    error: float  # its standard error, paired
    warned: int | None  # the iteration since which diversity is low; None: it is not

    def __str__(self) -> str:
        if self.since is not None:
            return (
                f"over-optimizing since iteration {self.since}: gold is {self.drop:.4g} below its "
                f"best, of iteration {self.best}, {self.drop / self.error:.1f} standard errors"
                if self.error
                else f"over-optimizing since iteration {self.since}: gold is {self.drop:.4g} below "
                f"its best, of iteration {self.best}"
            )
        if self.warned is not None:
            return (
                f"diversity is low since iteration {self.warned}, an early warning; gold has not "
                f"fallen, its best is of iteration {self.best}"
            )
        return f"gold has not fallen; its best is of iteration {self.best}"


def verdict(
    readings: Sequence[Reading], *, errors: float = ERRORS, diversity: float = DIVERSITY
) -> Verdict:
    """Whether the run over-optimizes, and since when.

    It does at a reading whose gold is below the best until then by more than ``errors`` standard
    errors, while the proxy is above its value there. The error is that of the mean of the samples'
    differences, ``std(gold_now - gold_best) / sqrt(n)`` with correction 1: prompts and noise are
    the same, so what they contribute falls out. The first such reading after the best one counts;
    a new best takes the alarm back. ``diversity`` is a share of the first reading's, and a warning
    only: diversity falls in good runs too.

    Raises:
        ValueError: no readings, of fewer than 2 samples, of different numbers of samples, or out of
            order.
    """
    _check(readings)
    best, since = 0, None
    for n, now in enumerate(readings):
        if now.mean > readings[best].mean:
            best, since = n, None
        drop, error = paired(readings[best].gold, now.gold)
        fallen = drop > errors * error and drop > 0
        if since is None and fallen and now.proxy > readings[best].proxy:
            since = now.iteration
    drop, error = paired(readings[best].gold, readings[-1].gold)
    return Verdict(readings[best].iteration, since, drop, error, _warned(readings, diversity))


def paired(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Mean of ``before - after`` of each sample, and its standard error."""
    differences = [a - b for a, b in zip(before, after, strict=True)]
    n = len(differences)
    mean = math.fsum(differences) / n
    variance = math.fsum((x - mean) ** 2 for x in differences) / (n - 1)
    return mean, math.sqrt(variance / n)


def _warned(readings: Sequence[Reading], share: float) -> int | None:
    """The iteration since which, without a break until now, diversity is low."""
    start, since = readings[0].diversity, None
    for now in readings:
        if start is None or now.diversity is None or now.diversity >= share * start:
            since = None
        elif since is None:
            since = now.iteration
    return since


def _check(readings: Sequence[Reading]) -> None:
    if not readings:
        raise ValueError("`readings` is empty; it needs an evaluation")
    sizes = {len(reading.gold) for reading in readings}
    if len(sizes) > 1 or min(sizes) < 2:
        raise ValueError(
            f"`readings` have {', '.join(map(str, sorted(sizes)))} samples; each needs the same "
            "ones, 2 or more"
        )
    iterations = [reading.iteration for reading in readings]
    if iterations != sorted(set(iterations)):
        raise ValueError(f"`readings` are of the iterations {iterations}; they need to rise")
