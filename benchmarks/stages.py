"""The stages of an op that can be timed: its forward, its backward, or both."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import guard_ops as go

from .cases import Case
from .contenders import Inputs, config_of, on
from .measure import AGAIN, Call, Race


class Prepared(NamedTuple):
    """``run`` is timed on what ``prepare`` made just before; ``wait`` waits for its end."""

    prepare: Callable[[], Tensor]
    run: Callable[[Tensor], object]
    wait: Call


def stage_call(case: Case, inputs: Inputs, backend: str | None) -> Call:
    """The op's forward (under no_grad), or forward and backward, on a backend."""
    forward, v = _forward(case, inputs), inputs.model_output

    def value() -> None:
        with on(backend), torch.no_grad():
            forward()

    def both() -> None:
        v.grad = None
        with on(backend):
            forward().backward()

    return value if case.stage == "forward" else both


def backward_alone(case: Case, inputs: Inputs, backend: str | None, wait: Call) -> Prepared:
    """The op's backward, after a forward that is not timed."""
    forward, v = _forward(case, inputs), inputs.model_output

    def prepare() -> Tensor:
        v.grad = None
        with on(backend):
            return forward()

    def run(out: Tensor) -> None:
        with on(backend):
            out.backward()

    return Prepared(prepare, run, wait)


def _forward(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    """The op as a function that returns a scalar from which backward can start."""
    if case.op == "sde_step":
        name = "noise" if case.form == "noise" else "seed"
        noise: Any = {name: getattr(inputs, name)}
        v = inputs.model_output.detach()
        return lambda: go.sde_step(v, inputs.sample, inputs.coeffs, **noise).log_prob
    operands = inputs.form(case.form)
    if case.op == "log_ratio":
        # weights [K, B] stand in for a custom objective
        weights = inputs.advantages.expand(inputs.model_output.shape[:2])
        return lambda: (go.log_ratio(inputs.model_output, **operands).log_ratio * weights).sum()
    config = config_of(case.objective, inputs)
    return lambda: (
        go.guard_loss(
            inputs.model_output, advantages=inputs.advantages, config=config, **operands
        ).loss
    )


def race_prepared(
    contenders: Mapping[str, Prepared],
    *,
    rounds: int,
    settle: float,
    timed: int,
    repeat: str,
    seed: int = 0,
) -> Race:
    """:func:`benchmarks.measure.race` for contenders of which only a part is timed."""
    calls = {**contenders, repeat + AGAIN: contenders[repeat]}
    order, shuffle = list(calls), random.Random(seed).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            call, start = calls[name], time.perf_counter()
            _seconds(call)
            _seconds(call)
            while time.perf_counter() - start < settle:
                _seconds(call)
            elapsed = [_seconds(call) for _ in range(timed)]
            seconds[name].append(statistics.median(elapsed))
    return Race(seconds, repeat)


def _seconds(call: Prepared) -> float:
    state = call.prepare()
    call.wait()
    start = time.perf_counter()
    call.run(state)
    call.wait()
    return time.perf_counter() - start
