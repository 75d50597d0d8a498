"""The named workloads: every contender's loss and gradient, shrunk to this machine's budget."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import cases, command, contenders, suite
from benchmarks.workloads import named

BACKENDS = suite.choose_backends(None)
DEVICE = suite.choose_device(BACKENDS)
MEGABYTE = 2**20
PLANNED = command.plan(named(None), command.SUITES, suite.ELEMENTS[DEVICE.type], DEVICE)


@pytest.mark.parametrize("case", PLANNED["workloads"], ids=lambda case: case.name)
def test_loss_and_gradient(
    case: cases.Case, benchmark: BenchmarkFixture, record: Callable[..., None]
) -> None:
    rows = suite.run_case(case, BACKENDS, DEVICE, command.SECONDS["workloads"])
    for row in rows:
        record("workloads", row, DEVICE.type)
    benchmark.extra_info["gpu_milliseconds"] = rows[0].get("gpu_milliseconds")
    inputs = contenders.make_inputs(case.workload, case.dtype, device=DEVICE)
    first = contenders.ours(inputs, case.form, case.objective, BACKENDS[0])
    benchmark.pedantic(suite.waited(first, DEVICE), rounds=10, warmup_rounds=2)
    slower = {
        row["contender"]: row["ratio"]
        for row in rows
        if row["contender"] in ("eager", "reference") and row["ratio"] < 1 - row["noise"]
    }
    assert BACKENDS[0] == "reference" or not slower, f"plain PyTorch is faster: {slower}"


@pytest.mark.parametrize("case", PLANNED["ops"], ids=lambda case: case.name)
def test_op(case: cases.Case, benchmark: BenchmarkFixture, record: Callable[..., None]) -> None:
    rows = suite.run_case(case, BACKENDS, DEVICE, command.SECONDS["ops"])
    for row in rows:
        record("ops", row, DEVICE.type)
    benchmark.extra_info["gpu_milliseconds"] = rows[0].get("gpu_milliseconds")
    inputs = contenders.make_inputs(case.workload, case.dtype, device=DEVICE)
    call = next(iter(suite.case_calls(case, inputs, BACKENDS[:1], DEVICE).values()))
    if callable(call):
        benchmark.pedantic(suite.waited(call, DEVICE), rounds=10, warmup_rounds=2)
    else:  # a backward, which needs a forward of its own each time
        benchmark.pedantic(call.run, setup=lambda: ((call.prepare(),), {}), rounds=10)
    if rows[0]["contender"] == "cpu" and case.stage != "backward":
        assert rows[0]["peak_bytes"] <= written_bytes(case) + MEGABYTE


def written_bytes(case: cases.Case) -> int:
    """The bytes of an op's results, which is all the memory that it may take."""
    size = case.dtype.itemsize
    if case.op == "sde_step":
        return case.workload.numel * (size + max(size, 4))  # the next sample; its mean
    return case.workload.numel * (size if case.stage == "both" else 0)
