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


def test_reference_runs_beside_the_ops_that_ask_for_it():
    names = {
        plain: {r["contender"] for r in suite.run_case(one, BACKENDS, CPU, 0.0, memory=False)}
        for plain, one in (
            (False, case()),
            (True, dataclasses.replace(case(), plain=True)),
        )
    }
    fused = {name for name in BACKENDS if name != "reference"}
    assert names[False] == (fused or {"reference"}) | {cases.COPY}
    assert names[True] == fused | {"reference", cases.COPY}


@pytest.fixture
def gpu(monkeypatch):
    """The CPU in a GPU's place, with a cache that three rollouts of TINY overflow; [events]."""
    events = []
    monkeypatch.setattr(suite.gpu_timing, "sets_beyond_cache", lambda nbytes, device: 3)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: events.append("synchronize"))
    honest = contenders.make_inputs

    def make_inputs(workload, dtype=torch.float32, *, seed=0, device=None, **more):
        events.append(f"rollout {seed}")
        return honest(workload, dtype, seed=seed, device="cpu", **more)

    copy = contenders.memory_copy
    monkeypatch.setattr(suite.contenders, "make_inputs", make_inputs)
    monkeypatch.setattr(suite.contenders, "memory_copy", lambda nbytes, device: copy(nbytes, "cpu"))
    return events


@pytest.mark.parametrize("stage", ["both", "backward"])
def test_on_a_gpu_a_row_has_its_time_between_events_too(stage, gpu, monkeypatch):
    timed = []
    monkeypatch.setattr(
        suite.gpu_timing, "replayed", lambda calls: timed.append(len(calls)) or 1e-3
    )
    monkeypatch.setattr(suite.gpu_timing, "part", lambda *_: timed.append("part") or 1e-3)
    one = case(stage=stage, op="log_ratio", objective="-")
    rows = suite.run_case(one, BACKENDS, torch.device("cuda"), 0.0, memory=False)
    assert all(set(row) == KEYS | {"gpu_milliseconds", "gpu_percent_of_copy"} for row in rows)
    assert set(timed) == ({3} if stage == "both" else {"part"})
    assert rows[0]["gpu_milliseconds"] == 1.0
    assert rows[-1]["gpu_percent_of_copy"] == 100.0
    made = [event for event in gpu if event != "synchronize"]
    count = suite.BLOCKS * (3 if stage == "both" else 1)
    assert sorted(made) == [f"rollout {seed}" for seed in range(count)]  # none is made twice


def test_a_contender_that_cannot_be_captured_has_no_gpu_time(gpu, monkeypatch):
    def refused(calls):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(suite.gpu_timing, "replayed", refused)
    with pytest.warns(RuntimeWarning, match="has no GPU time: operation not permitted"):
        rows = suite.run_case(case(), BACKENDS, torch.device("cuda"), 0.0, memory=False)
    assert all(set(row) == KEYS for row in rows)


def test_on_a_gpu_a_race_goes_over_rollouts_and_waits(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: made.append("wait"))
    calls = [lambda i=i: made.append(i) for i in range(2)]
    turn = suite._in_turn(calls, torch.device("cuda"))
    for _ in range(3):
        turn()
    assert made == [0, "wait", 1, "wait", 0, "wait"]
    assert suite._in_turn(calls, CPU) is calls[0]


def test_peak_memory_of_a_gpu_is_read_when_it_is_done(monkeypatch):
    order = []
    for name, value in {
        "synchronize": None,
        "memory_allocated": 100,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 150,
    }.items():
        monkeypatch.setattr(
            torch.cuda, name, lambda *_, name=name, value=value: order.append(name) or value
        )
    inputs = contenders.make_inputs(TINY)
    peak = suite.peak_bytes(lambda: order.append("call"), inputs, torch.device("cuda"))
    assert peak == 50
    assert order[-3:] == ["call", "synchronize", "max_memory_allocated"]
