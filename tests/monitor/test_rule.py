"""The verdict of readings: pure arithmetic, on hand-made and on simulated runs."""

from __future__ import annotations

import math

import pytest
import torch

from guard_ops.monitor import Reading, verdict
from guard_ops.monitor.rule import paired

SPREAD = [-0.3, -0.1, 0.1, 0.3]


def reading(iteration, gold, proxy, diversity=None):
    return Reading(iteration, proxy, [gold + x for x in SPREAD], diversity)


def test_a_paired_error_is_of_the_samples_differences():
    mean, error = paired([1.0, 2.0, 3.0], [0.5, 1.0, 1.5])
    assert mean == 1.0
    assert error == pytest.approx(torch.tensor([0.5, 1.0, 1.5]).std() / 3**0.5)


def test_gold_that_falls_while_the_proxy_rises_is_an_alarm_from_then_on():
    golds, proxies = (0.5, 0.7, 0.6, 0.4, 0.5), (1, 2, 3, 4, 5)
    readings = [reading(10 * n, g, p) for n, (g, p) in enumerate(zip(golds, proxies, strict=True))]
    assert verdict(readings[:2]).since is None
    found = verdict(readings)
    assert found.best == 10
    assert found.since == 20  # all samples fell alike: the error is 0
    assert found.drop == pytest.approx(0.2)
    assert str(found).startswith("over-optimizing since iteration 20: gold is 0.2 below its best")


def test_no_alarm_while_the_proxy_is_below_its_value_at_the_best():
    readings = [reading(0, 0.5, 1.0), reading(1, 0.7, 2.0), reading(2, 0.2, 1.9)]
    assert verdict(readings).since is None
    assert verdict([*readings, reading(3, 0.2, 2.1)]).since == 3


def test_a_drop_within_three_errors_is_none():
    before, n = [0.0] * 16, 16
    noise = [(-1.0) ** k for k in range(n)]  # of error 1 / sqrt(15)
    for drop, since in ((2.9 / 15**0.5, None), (3.1 / 15**0.5, 1)):
        after = [x - drop for x in noise]
        found = verdict([Reading(0, 0.0, before), Reading(1, 1.0, after)])
        assert found.since == since
        assert found.error == pytest.approx(1 / 15**0.5)
        assert found.drop == pytest.approx(drop)
        assert verdict([Reading(0, 0.0, before), Reading(1, 1.0, after)], errors=2).since == 1


def test_a_new_best_takes_the_alarm_back():
    golds = (0.5, 0.3, 0.6)
    readings = [reading(n, g, n) for n, g in enumerate(golds)]
    assert verdict(readings[:2]).since == 1
    assert verdict(readings).since is None
    assert verdict(readings).best == 2


def test_low_diversity_is_a_warning_and_never_an_alarm():
    readings = [reading(n, 0.5 + n, n, d) for n, d in enumerate((4.0, 2.9, 2.7, 2.0))]
    found = verdict(readings)
    assert (found.since, found.warned) == (None, 2)
    assert "diversity is low since iteration 2" in str(found)
    assert verdict([*readings, reading(9, 9.0, 9, 3.0)]).warned is None
    assert verdict([reading(0, 1, 1), reading(1, 1, 1)]).warned is None


@pytest.mark.parametrize(
    "readings, message",
    [
        ([], "is empty; it needs an evaluation"),
        ([Reading(0, 0.0, [1.0])], "have 1 samples; each needs the same ones, 2 or more"),
        ([Reading(0, 0.0, [1.0] * 2), Reading(1, 0.0, [1.0] * 3)], "have 2, 3 samples"),
        ([Reading(1, 0.0, [1.0] * 2), Reading(1, 0.0, [1.0] * 2)], r"\[1, 1\]; they need to rise"),
    ],
)
def test_readings_that_cannot_be_compared_are_refused(readings, message):
    with pytest.raises(ValueError, match=message):
        verdict(readings)


def simulated(seed: int, fall: float, runs: int = 100, readings: int = 13, n: int = 200):
    """Shares of alarms in runs whose samples' gold drifts at random, and falls by ``fall`` sd."""
    dice = torch.Generator().manual_seed(seed)
    alarms = 0
    for _ in range(runs):
        start = torch.randn(n, generator=dice)
        steps = 0.3 * torch.randn(readings, n, generator=dice)
        steps[0] = 0
        gold = start + steps.cumsum(0) - fall * torch.arange(readings)[:, None] / readings
        run = [Reading(t, float(t), gold[t].tolist()) for t in range(readings)]
        alarms += verdict(run).since is not None
    return alarms / runs


def test_runs_without_a_fall_are_rarely_alarmed_and_those_with_one_always():
    """On seeds that did not set the thresholds."""
    assert simulated(1, fall=0.0) <= 0.08  # 0.03 in 2,000 runs; 0.08 is 3 errors of 100 above
    assert simulated(2, fall=1.0) == 1.0
    assert not math.isnan(simulated(3, fall=0.5, runs=5))
