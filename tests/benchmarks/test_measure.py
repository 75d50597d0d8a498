"""The stopwatch itself: order, ratios, noise, peak memory, operator counts."""

import time

import pytest
import torch

from benchmarks import contenders, measure
from benchmarks.measure import AGAIN, Race
from benchmarks.workloads import Workload

TINY = Workload("tiny", "none", (16, 8), 4, 3, "none")
MIB = 2**20


def test_a_round_is_a_turn_of_every_contender_and_two_of_one():
    calls = []
    result = measure.race(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        rounds=6,
        warmup=2,
        settle=0.0,
        timed=3,
        repeat="a",
    )
    turns = [calls[i : i + 5] for i in range(0, len(calls), 5)]  # 2 untimed, 3 timed
    assert len(turns) == 8 * 3  # warm-up included
    assert all(len(set(turn)) == 1 for turn in turns)
    rounds = ["".join(turn[0] for turn in turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert all(sorted(order) == ["a", "a", "b"] for order in rounds)
    assert len(set(rounds)) > 1
    assert {name: len(s) for name, s in result.seconds.items()} == {"a": 6, "b": 6, "a" + AGAIN: 6}
    assert result.contenders == ["a", "b"]


def test_only_the_calls_after_a_turn_has_settled_are_timed(monkeypatch):
    now, count = [0.0], [0]

    def slow_at_first():  # every turn: 150 seconds of slow calls, then the median of 1, 9 and 2
        now[0] += (50.0, 50.0, 50.0, 1.0, 9.0, 2.0)[count[0] % 6]
        count[0] += 1

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    result = measure.race({"x": slow_at_first}, rounds=4, settle=101.0, timed=3, repeat="x")
    assert result.seconds["x"] == [2.0] * 4


def test_ratio_is_taken_within_each_round():
    # The machine is 10 times slower in the last rounds: medians of each would say 10 and 40.
    result = Race({"slow": [2.0, 20.0, 40.0], "fast": [1.0, 10.0, 10.0]}, "fast")
    assert result.ratio("slow", "fast") == 2.0
    assert result.median("fast") == 10.0


def test_a_contender_takes_the_time_that_passes_in_its_call(monkeypatch):
    now = [0.0]

    def takes(seconds):
        return lambda: now.__setitem__(0, now[0] + seconds)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    result = measure.race(
        {"short": takes(0.25), "long": takes(1.0)}, rounds=9, warmup=1, repeat="short"
    )
    assert result.median("short") == 0.25
    assert result.ratio("long", "short") == 4.0
    assert result.spread("long") == result.noise == 0.0


def test_noise_is_zero_on_a_perfect_machine_and_grows_with_jitter():
    steady = Race({"x": [1.0] * 8, "x" + AGAIN: [1.0] * 8}, "x")
    assert steady.noise == 0.0
    jitter = Race({"x": [1.0] * 8, "x" + AGAIN: [1.1, 0.9] * 4}, "x")
    assert 0.05 < jitter.noise < 0.3
    biased = Race({"x": [1.0] * 8, "x" + AGAIN: [1.2] * 8}, "x")
    assert biased.noise == pytest.approx(0.2)


def test_unknown_repeat_is_refused():
    with pytest.raises(ValueError, match="`repeat` is 'c'; it needs one of a, b"):
        measure.race({"a": lambda: None, "b": lambda: None}, rounds=2, repeat="c")


# Tolerance: allocator and interpreter pages, counters that the kernel batches per core.
@pytest.mark.parametrize(
    "kept, freed",
    [
        pytest.param(8, 0, marks=pytest.mark.slow_suite),
        (8, 4),
        pytest.param(0, 16, marks=pytest.mark.slow_suite),
    ],
)
def test_peak_counts_what_is_kept_and_what_is_already_freed(kept, freed):
    held = []

    def call():
        scratch = torch.ones(freed * MIB // 4)
        held.append(torch.ones(kept * MIB // 4))
        del scratch

    assert measure.peak_extra_bytes(call, held.clear) == pytest.approx(
        (kept + freed) * MIB, abs=0.5 * MIB
    )


def test_traffic_counts_whole_latent_operators_and_their_bytes():
    x, y = torch.ones(1000), torch.ones(1000)

    def call():
        total = (x * y).view(10, 100).sum()  # 2 reads and a write; then a read and a scalar
        return total + 1  # not over a whole latent

    counted = measure.traffic(call, 1000)
    assert counted == measure.Traffic(3, 2, (3 * 1000 + 1000 + 1) * 4)


def test_a_broadcast_operand_counts_what_is_stored():
    x = torch.ones(1000)
    counted = measure.traffic(lambda: x * torch.ones(1).expand(1000), 1000)
    assert counted.bytes_moved == (1000 + 1 + 1000) * 4


def test_environment_names_the_machine_but_neither_host_nor_path():
    environment = measure.environment()
    assert set(environment) == {
        "date", "cpu", "cores", "threads", "isa", "torch", "guard_ops", "commit",
    }  # fmt: skip
    assert environment["torch"] == torch.__version__
    assert "/" not in "".join(map(str, environment.values()))


# float32 chains against float32 kernels; ratios of a 1e-1 drift keep three digits.
@pytest.mark.parametrize(
    "form, objective, variant",
    [
        ("mean", "article", {}),
        ("mean", "article", {"recompute": True}),
        pytest.param(
            *("mean", "article", {"recompute": True, "compiled": True}),
            marks=pytest.mark.slow_suite,  # inductor's C++
        ),
        ("noise", "paper", {}),
        ("velocity", "flow_grpo", {}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_contenders_compute_the_same_gradient(form, objective, variant):
    inputs = contenders.make_inputs(TINY, drift=0.1)
    gradients = []
    for call in (
        contenders.ours(inputs, form, objective),
        contenders.chain(inputs, objective, **variant),
    ):
        call()
        gradients.append(inputs.model_output.grad)
    ours, plain = gradients
    assert ours is not plain
    assert (plain - ours).norm() <= 1e-3 * ours.norm()


def test_inputs_are_what_a_trainer_holds():
    inputs = contenders.make_inputs(TINY, torch.bfloat16)
    assert inputs.model_output.shape == inputs.noise.shape == (3, 4, 16, 8)
    assert inputs.model_output.requires_grad
    assert inputs.prev_sample.dtype == inputs.noise.dtype == torch.bfloat16
    assert inputs.old_mean.dtype == inputs.old_log_prob.dtype == torch.float32
    assert inputs.old_log_prob.shape == (3, 4)
    again = contenders.make_inputs(TINY, torch.bfloat16)
    assert torch.equal(inputs.model_output, again.model_output)


def test_memory_copy_moves_the_bytes_it_says():
    target = contenders.memory_copy(1000)()
    assert target.nbytes == 500
    assert bool((target == 1).all())
