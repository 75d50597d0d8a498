"""A case that is run: who races, what a row says, and that all compute the same."""

import dataclasses
import time

import pytest
import torch

from benchmarks import cases, contenders, stages, suite
from benchmarks.workloads import WORKLOADS, Workload

TINY = Workload("tiny", "none", (16, 8), 4, 3, "none", "flow_grpo")
CPU = torch.device("cpu")
BACKENDS = suite.choose_backends(None)
KEYS = {
    "case", "workload", "shape", "recipe_shape", "op", "stage", "form", "objective", "dtype",
    "contender", "base", "milliseconds", "spread", "ratio", "noise", "scatter", "rounds",
    "floor_bytes", "gigabytes_per_second", "percent_of_copy", "peak_bytes",
}  # fmt: skip


def case(op="guard_loss", stage="both", form="mean", objective="article", chains=()):
    return cases.Case(TINY, TINY, op, stage, form, objective, torch.float32, chains)


def test_a_row_for_each_contender():
    rows = suite.run_case(case(chains=(None,)), BACKENDS, CPU, seconds=0.0)
    fused = [name for name in BACKENDS if name != "reference"]
    expected = [(name, "mean") for name in BACKENDS]
    expected += [(name, form) for form in ("noise", "seeded") for name in fused]
    expected += [("eager", "log-prob"), ("memory copy", "-")]
    assert [(row["contender"], row["form"]) for row in rows] == expected
    assert all(set(row) == KEYS for row in rows)
    assert [row["base"] for row in rows] == [True] + [False] * (len(rows) - 1)
    assert rows[0]["ratio"] == 1.0
    assert rows[-1]["percent_of_copy"] == 100.0
    assert {row["rounds"] for row in rows} == {suite.BLOCKS * suite.ROUNDS[0]}
    by_form = {row["form"]: row["floor_bytes"] for row in rows}
    assert by_form["mean"] == 20 * TINY.numel
    assert by_form["log-prob"] == 16 * TINY.numel


def test_percent_of_copy_is_of_the_same_races_bandwidth():
    rows = suite.run_case(case(), BACKENDS, CPU, seconds=0.0, memory=False)
    first, copy = rows[0], rows[-1]
    moved = first["floor_bytes"] / first["milliseconds"]
    bandwidth = copy["floor_bytes"] / copy["milliseconds"]
    # milliseconds are rounded to 1e-5, of which a copy of 30 kB takes 100
    assert first["percent_of_copy"] == pytest.approx(100 * moved / bandwidth, rel=0.02, abs=0.1)


@pytest.mark.parametrize("op", ["guard_loss", "log_ratio"])
@pytest.mark.parametrize("form", cases.FORMS)
def test_stages_leave_the_gradient_that_both_leave(op, form):
    inputs = contenders.make_inputs(TINY, drift=0.1)
    gradients = []
    for backend in BACKENDS:
        for stage in ("both", "backward"):
            inputs.model_output.grad = None
            one = case(op, stage, form, "flow_grpo")
            if stage == "both":
                stages.stage_call(one, inputs, backend)()
            else:
                alone = stages.backward_alone(one, inputs, backend, lambda: None)
                state = alone.prepare()
                assert inputs.model_output.grad is None
                alone.run(state)
            gradients.append(inputs.model_output.grad)
    for other in gradients[1:]:
        # float32 sums in another order
        assert (other - gradients[0]).norm() <= 1e-4 * gradients[0].norm()


def test_a_forward_leaves_no_gradient():
    inputs = contenders.make_inputs(TINY)
    stages.stage_call(case(stage="forward"), inputs, None)()
    assert inputs.model_output.grad is None


def test_a_backward_is_timed_without_its_forward(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def passes(seconds):
        now[0] += seconds
        return torch.zeros(())

    slow_forward = stages.Prepared(lambda: passes(10.0), lambda _: passes(0.5), lambda: None)
    race = stages.race_prepared({"x": slow_forward}, rounds=4, settle=2.0, timed=3, repeat="x")
    assert race.median("x") == 0.5


@pytest.mark.parametrize("workload", ["hunyuan_720p", "wan21_720p"])
def test_dance_grpo_chain_agrees_with_guard_ops_on_its_own_steps(workload):
    small = dataclasses.replace(WORKLOADS[workload], latent=(4, 6, 6), batch=3, steps=2)
    inputs = contenders.make_inputs(small, drift=0.1)
    gradients = []
    chain = contenders.chain(inputs, "dance_grpo", kind="dance_sde")
    for call in (chain, contenders.ours(inputs, "mean", "dance_grpo")):
        call()
        gradients.append(inputs.model_output.grad)
    theirs, ours = gradients
    assert (theirs - ours).norm() <= 1e-3 * ours.norm()


def test_a_backend_that_is_not_there_is_refused_with_those_that_are():
    message = r"'tpu' is not available here: .*; available: .*reference"
    with pytest.raises(ValueError, match=message):
        suite.choose_backends(["tpu"])


def test_backends_keep_the_order_of_preference():
    assert suite.choose_backends(list(reversed(BACKENDS))) == BACKENDS
    assert suite.choose_backends(["reference"]) == ["reference"]
