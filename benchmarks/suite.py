"""Runs a case: every contender on the same tensors in interleaved rounds, a row for each."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from guard_ops.backends import available_backends, unavailable_backends

from . import contenders, gpu_timing, measure, stages
from .cases import COPY, Case, dtype_name, floor_bytes
from .measure import Call
from .results import Row

BLOCKS = 3  # each has its own tensors, as their place in memory is part of a rerun's scatter
ROUNDS = (2, 12)  # the least and the most in a block
SETTLE = {True: 0.03, False: 0.01}  # seconds of untimed calls in a turn: with chains, without
TIMED = 2  # timed calls in a turn
CHAIN_FORM = "log-prob"  # what the public trainers' chains are given
BESIDE = ("noise", "seeded")  # forms that run beside a workload's mean form
ELEMENTS = {"cpu": 2**21, "cuda": 2**29}  # the most elements that a workload's latents have
CHAIN_NAMES = {
    None: "eager",
    "default": "torch.compile",
    "max-autotune": "torch.compile max-autotune",
}


def choose_backends(names: Sequence[str] | None) -> list[str]:
    """The backends to race, the preferred one first; None for all that this machine has.

    Raises:
        ValueError: one is not available (the message says why, and which are), or no device runs
            all of them.
    """
    available = available_backends()
    for name in names or ():
        if name not in available:
            reason = unavailable_backends().get(name, "there is no such backend")
            raise ValueError(
                f"backend {name!r} is not available here: {reason}; "
                f"available: {', '.join(available)}"
            )
    chosen = [name for name in available if names is None or name in names]
    device = choose_device(chosen, strict=names is not None)
    return [name for name in chosen if _supports(name, device)]


def choose_device(backends: Sequence[str], strict: bool = False) -> torch.device:
    """The GPU if there is one that a fused backend (or, alone, ``reference``) runs on."""
    devices = ["cuda"] if torch.cuda.is_available() else []
    for kind in [*devices, "cpu"]:
        device = torch.device(kind)
        runs = [name for name in backends if _supports(name, device)]
        fused = [name for name in runs if name != "reference"]
        if runs == list(backends) or (fused and not strict):
            return device
    if not strict:
        return torch.device("cpu")
    raise ValueError(f"no device here runs all of {', '.join(backends)}; bench them one by one")


def _supports(name: str, device: torch.device) -> bool:
    return bool(import_module(f"guard_ops.backends.{name}").supports(device))


def run_case(
    case: Case, backends: Sequence[str], device: torch.device, seconds: float, memory: bool = True
) -> list[Row]:
    """Race the case's contenders for about ``seconds`` (not counting compilation).

    Returns:
        A row for each contender: median ``milliseconds``, ``spread`` (interquartile range over
        median), ``ratio`` (how many times the first backend's time, median of the rounds' ratios),
        ``noise`` (the first backend against itself), ``scatter`` (range of the blocks' medians over
        the median, by which another run may differ), bytes, ``percent_of_copy`` and peak memory. On
        a GPU ``milliseconds`` is wall time, and ``gpu_milliseconds`` the time between events, of a
        graph's replay if possible; every call is on tensors that the cache no longer holds.
    """
    if case.chains:
        torch._dynamo.reset()  # else chains that reach the limit of recompilations run eagerly
    races: list[measure.Race] = []
    peaks: dict[str, int] = {}
    gpu: dict[str, float | None] = {}
    rounds = 0
    with warnings.catch_warnings():
        # a batch of one is degenerate under standardize, but takes the same time
        warnings.filterwarnings("ignore", message="guard_ops:", category=RuntimeWarning)
        for block in range(BLOCKS):
            rollouts = _rollouts(case, block, device)
            calls = [case_calls(case, inputs, backends, device) for inputs in rollouts]
            turns = {name: _in_turn([one[name] for one in calls], device) for name in calls[0]}
            base = next(iter(turns))
            settle = SETTLE[bool(case.chains)]
            if block == 0:
                rounds = _rounds(turns, seconds / BLOCKS, settle)
            races.append(_race(turns, base, rounds, settle, block))
            if memory and block == 0 and case.stage != "backward":
                peaks = _peaks(case, calls[0], base, rollouts[0], device)
            if device.type == "cuda" and block == 0:
                gpu = {name: _gpu_seconds(name, [one[name] for one in calls]) for name in turns}
    return _rows(case, races, base, peaks, gpu)


def _rollouts(case: Case, block: int, device: torch.device) -> list[contenders.Inputs]:
    """One rollout, or on a GPU so many that calls on them in turn find nothing in the cache.

    A backward alone is not called in turn, as it finds there what its own forward has left.
    """
    sets = 1
    if device.type == "cuda" and case.stage != "backward":
        forms = (case.form, *BESIDE) if case.chains else (case.form,)
        least = min(floor_bytes(case, form) for form in forms)
        sets = gpu_timing.sets_beyond_cache(least, device)
    seeds = range(block, block + BLOCKS * sets, BLOCKS)
    return [
        contenders.make_inputs(case.workload, case.dtype, seed=seed, device=device)
        for seed in seeds
    ]


def _in_turn(calls: Sequence[Any], device: torch.device) -> Call | stages.Prepared:
    """The call that is raced: on a GPU it takes the next rollout each time, and waits."""
    if device.type != "cuda" or isinstance(calls[0], stages.Prepared):
        first: Call | stages.Prepared = calls[0]
        return first
    return waited(gpu_timing.Rotation(calls), device)


def waited(call: Call, device: torch.device) -> Call:
    """``call``, which returns only when the device is done with it."""
    if device.type == "cpu":
        return call

    def whole() -> None:
        call()
        torch.cuda.synchronize(device)

    return whole


def _gpu_seconds(name: str, calls: Sequence[Any]) -> float | None:
    """Time between events of a contender's calls on each rollout; None if it cannot be measured."""
    try:
        if isinstance(calls[0], stages.Prepared):
            return gpu_timing.part(calls[0].prepare, calls[0].run)
        if "max-autotune" in name:  # it replays graphs of its own
            return gpu_timing.timed(gpu_timing.Rotation(calls))
        return gpu_timing.replayed(calls)
    except RuntimeError as error:
        warnings.warn(f"{name} has no GPU time: {error}", RuntimeWarning, stacklevel=2)
        return None


def case_calls(
    case: Case, inputs: contenders.Inputs, backends: Sequence[str], device: torch.device
) -> dict[str, Call | stages.Prepared]:
    """Label -> call of every contender, the first backend first."""
    wait = torch.cuda.synchronize if device.type == "cuda" else _nothing
    calls: dict[str, Any] = {}
    fused = [backend for backend in backends if backend != "reference"]
    if fused and not (case.chains or case.plain):
        backends = fused
    for backend in backends:
        if case.stage == "backward":
            calls[_label(backend, case.form)] = stages.backward_alone(case, inputs, backend, wait)
        else:
            calls[_label(backend, case.form)] = stages.stage_call(case, inputs, backend)
    if case.stage == "backward":
        return calls | {
            COPY: stages.Prepared(
                _no_state, _ignoring_state(contenders.memory_copy(_copy_bytes(case), device)), wait
            )
        }
    if case.chains:
        for form in BESIDE:
            for backend in fused:
                calls[_label(backend, form)] = contenders.ours(
                    inputs, form, case.objective, backend
                )
    for mode in case.chains:
        calls[_label(CHAIN_NAMES[mode], CHAIN_FORM)] = contenders.chain(
            inputs, case.objective, compiled=mode or False, kind=case.workload.kind
        )
    calls[COPY] = contenders.memory_copy(_copy_bytes(case), device)
    return calls


def _label(contender: str, form: str) -> str:
    return f"{contender} | {form}"


def _nothing() -> None:
    pass


def _no_state() -> Tensor:
    return torch.empty(0)


def _ignoring_state(call: Call) -> Any:
    return lambda state: call()


def _copy_bytes(case: Case) -> int:
    """Bytes that the copy beside a case moves: its floor, or two latents if that is less."""
    return max(floor_bytes(case), case.workload.numel * 2 * case.dtype.itemsize)


def _rounds(calls: Mapping[str, Any], seconds: float, settle: float) -> int:
    """How many rounds fit in ``seconds``, from calling every contender twice."""
    cost = 0.0
    for call in calls.values():
        prepared = isinstance(call, stages.Prepared)
        for _ in range(2):  # only the second counts, as the first may compile
            start = time.perf_counter()
            if prepared:
                call.run(call.prepare())
                call.wait()
            else:
                call()
        one = time.perf_counter() - start
        cost += max(settle, 2 * one) + TIMED * one
    fitting = int(seconds / cost)
    return min(max(fitting, ROUNDS[0]), ROUNDS[1])


def _race(
    calls: Mapping[str, Any], base: str, rounds: int, settle: float, seed: int
) -> measure.Race:
    if isinstance(calls[base], stages.Prepared):
        return stages.race_prepared(
            calls, rounds=rounds, settle=settle, timed=TIMED, repeat=base, seed=seed
        )
    return measure.race(
        calls, rounds=rounds, warmup=0, settle=settle, timed=TIMED, repeat=base, seed=seed
    )


def _peaks(
    case: Case,
    calls: Mapping[str, Any],
    base: str,
    inputs: contenders.Inputs,
    device: torch.device,
) -> dict[str, int]:
    """Peak extra memory of every contender of a workload, or of an op's first backend."""
    gc.freeze()  # so that what lives now is not searched again before each of dozens of calls
    try:
        return {
            name: peak_bytes(call, inputs, device)
            for name, call in calls.items()
            if name == base or (case.chains and name != COPY)
        }
    finally:
        gc.unfreeze()


def peak_bytes(call: Call, inputs: contenders.Inputs, device: torch.device) -> int:
    """How far one call raises memory at its highest, in the process or in the GPU's allocator."""

    def release() -> None:
        inputs.model_output.grad = None

    if device.type == "cpu":
        return measure.peak_extra_bytes(call, release, repeats=1)
    release()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _rows(
    case: Case,
    races: Sequence[measure.Race],
    base: str,
    peaks: Mapping[str, int],
    gpu: Mapping[str, float | None],
) -> list[Row]:
    merged = measure.Race(
        {name: [s for race in races for s in race.seconds[name]] for name in races[0].seconds},
        base,
    )
    copy_rate = _copy_bytes(case) / merged.median(COPY)
    rows: list[Row] = []
    for label in merged.contenders:
        contender, _, form = label.partition(" | ")
        seconds, medians = merged.median(label), [race.median(label) for race in races]
        moved = _copy_bytes(case) if label == COPY else floor_bytes(case, form)
        rows.append(
            {
                "case": case.name,
                "workload": case.workload.name,
                "shape": list(case.workload.shape),
                "recipe_shape": list(case.recipe.shape),
                "op": case.op,
                "stage": case.stage,
                "form": form or "-",
                "objective": case.objective,
                "dtype": dtype_name(case.dtype),
                "contender": contender,
                "base": base == label,
                "milliseconds": round(seconds * 1e3, 5),
                "spread": round(merged.spread(label), 4),
                "ratio": round(merged.ratio(label, base), 4),
                "noise": round(merged.noise, 4),
                "scatter": round((max(medians) - min(medians)) / statistics.median(medians), 4),
                "rounds": len(merged.seconds[label]),
                "floor_bytes": moved,
                "gigabytes_per_second": round(moved / seconds / 1e9, 3),
                "percent_of_copy": round(100 * moved / seconds / copy_rate, 1),
                "peak_bytes": peaks.get(label),
                **_gpu_columns(gpu.get(label), gpu.get(COPY), moved, _copy_bytes(case)),
            }
        )
    return rows


def _gpu_columns(
    seconds: float | None, copy: float | None, moved: int, copied: int
) -> dict[str, float]:
    """The columns that only a GPU's rows have: its own time, and bandwidth relative to the copy."""
    if seconds is None:
        return {}
    more = {"gpu_milliseconds": round(seconds * 1e3, 5)}
    if copy is not None:
        more["gpu_percent_of_copy"] = round(100 * (moved / seconds) / (copied / copy), 1)
    return more
