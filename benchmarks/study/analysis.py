"""What the study's runs say of each claim: pure arithmetic on their JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from guard_ops.digits.tables import at_equal_proxy
from guard_ops.monitor.rule import Reading, Verdict, verdict
from guard_ops.trainer.extras import require

from .runs import OBJECTIVES, SAMPLERS, golds
from .tasks import TASKS

Run = dict[str, Any]  # a run's JSON
Seeds = dict[int, dict[str, Run]]  # by seed and objective

SETTINGS = tuple((task, sampler) for task in TASKS for sampler in SAMPLERS)
GUARDS = OBJECTIVES[1:]


class Interval(NamedTuple):
    """Mean over seeds with its 95 % t interval."""

    mean: float
    half: float  # infinite for one seed
    n: int
    above: int  # how many of the n are above 0,
    below: int  # and below

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        n = len(values)
        signs = sum(x > 0 for x in values), sum(x < 0 for x in values)
        if n < 2:
            return cls(fmean(values), math.inf, n, *signs)
        quantile = float(require("scipy.stats", "study").t.ppf(0.975, n - 1))
        return cls(fmean(values), quantile * stdev(values) / math.sqrt(n), n, *signs)

    @property
    def sign(self) -> int:
        """1 or -1 where all of the interval is above or below 0; else 0."""
        if abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1


class Alarm(NamedTuple):
    """The monitor on a run."""

    run: Run
    verdict: Verdict
    change: float  # of gold from the first evaluation to the last, over all samples
    error: float  # its paired standard error

    @property
    def errors(self) -> float:
        """By how many standard errors gold has changed."""
        if self.error == 0:
            return math.copysign(math.inf, self.change) if self.change else 0.0
        return self.change / self.error


def load(folder: Path) -> list[Run]:
    """All runs in a folder."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*-s*.json"))]


def seeds_of(runs: Sequence[Run], task: str, sampler: str) -> Seeds:
    """The seeds of a setting that have all three objectives."""
    found: Seeds = {}
    for run in runs:
        if (run["task"], run["sampler"]) == (task, sampler) and run["objective"] in OBJECTIVES:
            found.setdefault(run["seed"], {})[run["objective"]] = run
    return {seed: found[seed] for seed in sorted(found) if len(found[seed]) == len(OBJECTIVES)}


def per_step(run: Run, name: str) -> list[float]:
    """Mean over training of a number of each trained step."""
    return [fmean(values) for values in zip(*run["steps"][name], strict=True)]


def over_seeds(seeds: Seeds, objective: str, number: Callable[[Run], float]) -> Interval:
    """Of a run's number."""
    return Interval.of([number(by[objective]) for by in seeds.values()])


def gain(seeds: Seeds, objective: str, number: Callable[[Run], float]) -> Interval:
    """Of what an objective's number exceeds plain's by, seed by seed."""
    return Interval.of([number(by[objective]) - number(by["plain"]) for by in seeds.values()])


def at_end(name: str) -> Callable[[Run], float]:
    """A run's number at its last evaluation."""
    return lambda run: float(run["evaluations"][-1][name])


def gain_at_equal_proxy(seeds: Seeds, objective: str, name: str) -> Interval:
    """The same as :func:`gain`, where each run first reached the proxy that both reached."""
    differences = []
    for by in seeds.values():
        _, there = at_equal_proxy({x: by[x]["evaluations"] for x in ("plain", objective)})
        differences.append(there[objective][name] - there["plain"][name])
    return Interval.of(differences)


def last_bias(run: Run) -> float:
    """Mean of the raw ratio less 1 at the last trained step, in its spread there."""
    return per_step(run, "ratio_bias")[-1] / per_step(run, "ratio_std")[-1]


def last_hat_bias(run: Run) -> float:
    """The same of the normalized ratio."""
    return per_step(run, "ratio_hat_bias")[-1] / per_step(run, "ratio_hat_std")[-1]


def growth(name: str) -> Callable[[Run], float]:
    """A number's largest over its smallest, over the steps."""
    return lambda run: max(per_step(run, name)) / min(per_step(run, name))


def growth_in_training(name: str) -> Callable[[Run], float]:
    """The same at the last trained step, over the quarters of training."""

    def of(run: Run) -> float:
        values = [quarter[-1] for quarter in run["steps"][name]]
        return float(max(values) / min(values))

    return of


def clip_range(run: Run) -> float:
    """Share of samples above the clip: largest less smallest over the steps."""
    above = per_step(run, "clip_fraction_high")
    return max(above) - min(above)


def alarms(runs: Sequence[Run]) -> list[Alarm]:
    """The monitor on every run of the three objectives."""
    return [_alarm(run) for run in runs if run["objective"] in OBJECTIVES]


def _alarm(run: Run) -> Alarm:
    readings = [
        Reading(at["iteration"], at["proxy"], gold, at["diversity"])
        for at, gold in zip(run["evaluations"], golds(run), strict=True)
    ]
    return Alarm(run, verdict(readings), *run["gold_change"])


class Tally(NamedTuple):
    """How the monitor did on one kind of runs."""

    runs: list[Alarm]
    wrong: list[Alarm]


def false_alarms(found: Sequence[Alarm]) -> Tally:
    """Of the runs whose gold ends within 2 standard errors of its start, those with an alarm."""
    steady = [x for x in found if abs(x.errors) <= 2]
    return Tally(steady, [x for x in steady if x.verdict.since is not None])


def missed(found: Sequence[Alarm]) -> Tally:
    """Of the runs whose gold ends 5 standard errors below its start, those without one."""
    fallen = [x for x in found if x.errors <= -5]
    return Tally(fallen, [x for x in fallen if x.verdict.since is None])
