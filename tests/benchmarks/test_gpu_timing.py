"""Timing on a GPU, on one that is made up: a clock that calls and replays move on."""

import contextlib
import types

import pytest
import torch

from benchmarks import gpu_timing

LAUNCH = 5e-6  # seconds that a replay costs the host


class Machine:
    """Calls take time of its clock; under capture they are kept instead."""

    def __init__(self):
        self.now, self.recording, self.graphs = 0.0, None, []

    def call(self, name, seconds):
        def made():
            if self.recording is None:
                self.now += seconds
            else:
                self.recording.append((name, seconds))

        return made


@pytest.fixture
def machine(monkeypatch):
    found = Machine()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = found.now

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    class Graph:
        def __init__(self):
            self.calls = []
            found.graphs.append(self)

        def replay(self):
            found.now += max(LAUNCH, sum(seconds for _, seconds in self.calls))

    @contextlib.contextmanager
    def graph(into, stream):
        found.recording = into.calls
        yield
        found.recording = None

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    return found


def test_a_small_kernel_is_not_timed_by_its_launches(machine):
    assert gpu_timing.replayed([machine.call("a", 2e-6)]) == pytest.approx(2e-6)
    _, graph = machine.graphs
    assert len(graph.calls) == gpu_timing.GRAPH_CALLS


def test_a_graph_lasts_long_enough_and_no_longer(machine):
    assert gpu_timing.replayed([machine.call("a", 30e-6)]) == pytest.approx(30e-6)
    assert len(machine.graphs[-1].calls) == 7  # 210 microseconds
    assert gpu_timing.replayed([machine.call("a", 1e-3)]) == pytest.approx(1e-3)
    assert len(machine.graphs[-1].calls) == 1


def test_a_graph_goes_over_all_its_inputs_equally_often(machine):
    calls = [machine.call(i, 20e-6) for i in range(6)]
    assert gpu_timing.replayed(calls) == pytest.approx(20e-6)
    assert [name for name, _ in machine.graphs[-1].calls] == [*range(6), *range(6)]
    assert gpu_timing.graph_calls(1e-3, 40) == 40
    assert gpu_timing.graph_calls(1e-6, 20) == 40


def test_time_as_called_is_that_of_a_call(machine):
    for seconds in (3e-7, 4e-5, 0.1):
        assert gpu_timing.timed(machine.call("a", seconds)) == pytest.approx(seconds)


def test_a_part_is_timed_without_what_prepares_it(machine):
    prepare, run = machine.call("forward", 5e-3), machine.call("backward", 1e-3)
    assert gpu_timing.part(prepare, lambda state: run()) == pytest.approx(1e-3)


def test_a_rotation_makes_one_call_after_the_other():
    made = []
    calls = [lambda i=i: made.append(i) for i in range(3)]
    rotation = gpu_timing.Rotation(calls)
    for _ in range(7):
        rotation()
    assert made == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    "nbytes, sets", [(6 << 20, 17), (50 << 20, 3), (60 << 20, 2), (101 << 20, 1), (1 << 10, 128)]
)
def test_sets_together_exceed_twice_the_cache(nbytes, sets, monkeypatch):
    properties = types.SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert gpu_timing.sets_beyond_cache(nbytes) == sets
    assert sets * nbytes > 100 << 20 or sets == gpu_timing.SETS
