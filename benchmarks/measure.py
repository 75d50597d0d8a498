"""Times a race in interleaved rounds; measures the machine's noise, peak memory and traffic."""

from __future__ import annotations

import ctypes
import datetime
import gc
import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import guard_ops

Call = Callable[[], object]
AGAIN = " (again)"


@dataclass(frozen=True)
class Race:
    """Seconds of every contender in every round; ``repeated`` has two turns in each."""

    seconds: dict[str, list[float]]
    repeated: str

    @property
    def contenders(self) -> list[str]:
        """The names raced, each once."""
        return [name for name in self.seconds if not name.endswith(AGAIN)]

    def median(self, name: str) -> float:
        """Median seconds of a contender."""
        return statistics.median(self.seconds[name])

    def spread(self, name: str) -> float:
        """Interquartile range of a contender's seconds, relative to their median."""
        low, _, high = statistics.quantiles(self.seconds[name], n=4)
        return (high - low) / self.median(name)

    def ratio(self, slow: str, fast: str) -> float:
        """How many times as long ``slow`` takes as ``fast``: the median of the rounds' ratios."""
        return statistics.median(self._ratios(slow, fast))

    @property
    def noise(self) -> float:
        """Relative difference below which two contenders are a tie.

        It is taken from the contender that ran twice: how far the median of its ratio to itself is
        from 1, plus two standard errors of that median (1.25 sigma / sqrt(rounds), with sigma from
        the interquartile range).
        """
        ratios = self._ratios(self.repeated + AGAIN, self.repeated)
        low, middle, high = statistics.quantiles(ratios, n=4)
        return float(abs(middle - 1) + 2 * 1.2533 * (high - low) / 1.349 / len(ratios) ** 0.5)

    def _ratios(self, slow: str, fast: str) -> list[float]:
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=True)
        return [a / b for a, b in pairs]


def race(
    contenders: Mapping[str, Call],
    *,
    rounds: int,
    warmup: int = 2,
    settle: float = 0.03,
    timed: int = 3,
    repeat: str,
    seed: int = 0,
) -> Race:
    """Time every contender once a round, in an order drawn anew for each round.

    A slow spell of the machine then falls on all of them. In its turn a contender is called for
    ``settle`` seconds, and at least twice, untimed; its time is the median of ``timed`` more calls.
    So it finds the caches and the allocator as its own calls leave them, not as a neighbour did. (A
    last-level cache takes several passes over 30 MB to forget what came before, and the C library
    some frees to give a neighbour's memory back. With one untimed call, a kernel looks up to twice
    as slow behind one that allocates much, and a result would depend on the other contenders.)

    Args:
        contenders: name -> call.
        rounds: timed rounds, at least 2.
        warmup: rounds before them that are not timed (compilation, thread pools).
        settle: seconds of untimed calls in a turn. timed: calls timed after them.
        repeat: the contender that has two turns a round, for :attr:`Race.noise`.

    Raises:
        ValueError: ``repeat`` is not a contender.
    """
    if repeat not in contenders:
        raise ValueError(f"`repeat` is {repeat!r}; it needs one of {', '.join(contenders)}")
    calls = {**contenders, repeat + AGAIN: contenders[repeat]}
    order, shuffle = list(calls), random.Random(seed).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for current in range(-warmup, rounds):
        shuffle(order)
        for name in order:
            elapsed = _turn(calls[name], settle, timed)
            if current >= 0:
                seconds[name].append(elapsed)
    return Race(seconds, repeat)


def _turn(call: Call, settle: float, timed: int) -> float:
    start = time.perf_counter()
    call()
    call()
    while time.perf_counter() - start < settle:
        call()
    elapsed = []
    for _ in range(timed):
        start = time.perf_counter()
        call()
        elapsed.append(time.perf_counter() - start)
    return statistics.median(elapsed)


def peak_extra_bytes(call: Call, release: Call, repeats: int = 5) -> int:
    """How far one call raises the process's resident memory at its highest, in bytes (Linux).

    It measures resident memory instead of asking torch's allocator, because scratch that a C++
    kernel takes from malloc or keeps on its threads' stacks counts, and torch.profiler never sees
    it. Before each call ``release`` drops what the last one left (its gradient), and freed memory
    goes back to the system (also what the CPU backend keeps), so that every byte the call touches
    is a new page. Linux's own high-water mark (reset through ``clear_refs``) then catches peaks of
    any length. The result is the median over the repeats, after two warm-up calls; it resolves
    about 0.1 MB.
    """
    trim = ctypes.CDLL(None).malloc_trim
    peaks = []
    for repeat in range(-2, repeats):
        release()
        gc.collect()
        if "cpu" in guard_ops.available_backends():
            from guard_ops.backends import cpu

            cpu.release_memory()
        trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        call()
        peak = _status_bytes("VmHWM") - before
        if repeat >= 0:
            peaks.append(peak)
    return int(statistics.median(peaks))


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; peak memory is measured on Linux")


@dataclass(frozen=True)
class Traffic:
    """The operators of a call; ``bytes_moved`` is what those over whole latents read and write."""

    operators: int
    whole_latent_operators: int
    bytes_moved: int


class _Counter(TorchDispatchMode):
    def __init__(self, numel: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel, self.operators, self.whole, self.bytes_moved = numel, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or "detach" in func.name():
            return out
        self.operators += 1
        inputs = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)]
        outputs = out if isinstance(out, (tuple, list)) else (out,)
        tensors = [*inputs, *(x for x in outputs if isinstance(x, Tensor))]
        if any(_stored(x) >= self.numel for x in tensors):
            self.whole += 1
            self.bytes_moved += sum(_stored(x) * x.element_size() for x in tensors)
        return out


def _stored(x: Tensor) -> int:
    """Elements that exist in memory: a dimension of stride 0 is one element, however long."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count


def traffic(call: Call, numel: int) -> Traffic:
    """Count the operators that PyTorch dispatches in ``call``, backward included.

    ``numel`` is the size of a whole latent tensor; views count nothing. A fused kernel is one
    operator that reads its operands and writes its results once, whatever it does inside.
    """
    with _Counter(numel) as counter:
        call()
    return Traffic(counter.operators, counter.whole, counter.bytes_moved)


def environment() -> dict[str, Any]:
    """What a result was measured on, without a host name or a path."""
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _isa(),
        "torch": torch.__version__,
        "guard_ops": guard_ops.__version__,
        "commit": _commit(),
    }


def _isa() -> str:
    if "cpu" not in guard_ops.available_backends():
        return "no cpu backend"
    from guard_ops.backends.compiled import build_info

    return str(build_info()["cpu_isa"])


_SOURCES = (":(top)", ":(top,exclude)benchmarks/results")  # saved results do not change the sources


def _commit() -> str:
    """The short commit, with "+" if the sources have changed since; "unknown" outside git."""
    root = Path(__file__).parent
    try:
        head, changes, _ = (
            subprocess.run(
                ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (
                ("rev-parse", "--short", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no", "--", *_SOURCES),
                # fails if the commit is that of another repository around this file
                ("ls-files", "--error-unmatch", Path(__file__).name),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changes else "")
