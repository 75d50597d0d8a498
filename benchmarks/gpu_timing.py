"""Times calls on a GPU: between events, replayed from a CUDA graph, on inputs that no cache holds.

A replay costs the host about five microseconds, which is what a small kernel takes, so a graph
holds several calls and its time is divided by their number.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import torch

from .measure import Call

REPEATS = 20  # a time is the median of so many
BATCH_SECONDS = 5e-3  # how long the calls between two events take
GRAPH_SECONDS = 200e-6  # a graph lasts at least so long,
GRAPH_CALLS = 32  # unless it would need more calls than this
SETS = 128  # the most sets of inputs
PAUSE_CYCLES = 2_000_000  # about a millisecond: longer than the host takes to launch a few kernels


class Rotation:
    """A call that makes the next of ``calls`` each time, and begins again after the last."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls, self._next = list(calls), 0

    def __call__(self) -> object:
        call = self._calls[self._next]
        self._next = (self._next + 1) % len(self._calls)
        return call()


def sets_beyond_cache(nbytes: int, device: torch.device | str = "cuda") -> int:
    """How many inputs of ``nbytes`` it takes to exceed twice the device's second-level cache.

    A kernel that is called on each of them in turn finds none in the cache. One set is enough if it
    is that large by itself.
    """
    cache = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
    return min(SETS, 2 * cache // nbytes + 1)


def timed(call: Call, repeats: int = REPEATS) -> float:
    """Median seconds of one call, from batches of calls between two events, of about 5 ms each."""

    def batch(count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / count

    batch(2)
    count = max(1, min(500, round(BATCH_SECONDS / max(batch(2), 1e-6))))
    return statistics.median(batch(count) for _ in range(repeats))


def replayed(calls: Sequence[Call], repeats: int = REPEATS) -> float:
    """Median seconds of GPU time of one call, replayed from a graph of ``calls`` in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (calls[0], calls[0], *calls):  # the first calls compile
            call()
    torch.cuda.current_stream().wait_stream(stream)
    count = graph_calls(timed(_captured(calls[:1], stream).replay, 3), len(calls))
    graph = _captured([calls[i % len(calls)] for i in range(count)], stream)
    return timed(graph.replay, repeats) / count


def graph_calls(seconds: float, sets: int) -> int:
    """How many calls of ``seconds`` a graph holds: equally many on each set, and at least one."""
    wanted = min(GRAPH_CALLS, math.ceil(GRAPH_SECONDS / max(seconds, 1e-9)))
    return math.ceil(wanted / sets) * sets


def _captured(calls: Sequence[Call], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph


def part(
    prepare: Callable[[], torch.Tensor],
    run: Callable[[torch.Tensor], object],
    repeats: int = REPEATS,
) -> float:
    """Median seconds of GPU time of ``run``, each on what ``prepare`` made before it.

    This is for what happens once and so cannot be replayed, such as a backward. The device is kept
    busy until the host has launched it, so that between the events there are only its kernels.
    """
    seconds = []
    for _ in range(repeats):
        state = prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(PAUSE_CYCLES)
        start.record()
        run(state)
        end.record()
        end.synchronize()
        seconds.append(float(start.elapsed_time(end)) / 1e3)
    return statistics.median(seconds)
