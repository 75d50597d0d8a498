"""Who computes: each backend and instruction set of this machine, and none in place of another.

``reference`` and the C++ kernels, as the process has chosen them, run here. An instruction set is
chosen when a process starts, and an emulated or interpreted device replaces parts of it, so every
other contender is a process of its own that is sent calls and returns results.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import pickle
from collections.abc import Callable
from typing import Any

import operations
import peer
import tally
import torch
from truth import LATENTS

import guard_ops as go
from guard_ops.backends import compiled

ASKED = tuple(os.environ.get("GUARD_OPS_FUZZ_WITH", "").split())  # of "triton" and "cuda"
ENVIRONMENTS = {
    "triton": {"TRITON_INTERPRET": "1", "GUARD_OPS_BACKEND": "triton"},
    "cuda": {"GUARD_OPS_EMULATED": "1", "GUARD_OPS_BACKEND": "cuda"},
}
Results = dict[str, torch.Tensor]


def instruction_sets() -> tuple[str, ...]:
    """Those that are compiled; the processor may lack some."""
    return tuple(compiled.build_info()["cpu_isa_built"].split())


class Contender:
    """``name`` and a function from a call to its results; ``wide`` if it takes float64."""

    def __init__(self, name: str, run: Callable[[operations.Call], Results], wide: bool) -> None:
        self.name, self.run, self.wide = name, run, wide

    def takes(self, arguments: dict[str, Any]) -> bool:
        """Whether it has kernels for a call's latents."""
        latents = (arguments.get(name) for name in LATENTS)
        return self.wide or all(x is None or x.dtype != torch.float64 for x in latents)


def _here(backend: str, call: operations.Call) -> Results:
    with go.use_backend(backend):
        return operations.run(call)


def _peer(
    environment: dict[str, str],
) -> tuple[dict[str, str], Callable[[operations.Call], Results]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])  # imported once, whatever the number of peers
    mine, theirs = context.Pipe()
    process = context.Process(target=peer.serve, args=(theirs, environment), daemon=True)
    process.start()
    theirs.close()
    atexit.register(process.kill)

    def ask(message: Any) -> Any:
        mine.send_bytes(pickle.dumps(message))
        kind, answer = pickle.loads(mine.recv_bytes())
        if kind == "error":
            raise AssertionError(f"the process with {environment} raised:\n{answer}")
        return answer

    return ask("who"), ask


@functools.cache
def contenders() -> tuple[Contender, ...]:
    """All that run here. One that is asked for and does not run is an error."""
    found = [Contender("reference", functools.partial(_here, "reference"), True)]
    chosen = compiled.build_info()["cpu_isa"]
    found.append(Contender(f"cpu-{chosen}", functools.partial(_here, "cpu"), True))
    for isa in instruction_sets():
        if isa == chosen:
            continue
        who, ask = _peer({"GUARD_OPS_CPU_ISA": isa, "GUARD_OPS_BACKEND": "cpu"})
        if who["cpu_isa"] == isa:
            found.append(Contender(f"cpu-{isa}", ask, True))
        else:
            tally.absent(f"cpu-{isa} (not in this processor)")
    for name in ASKED:
        who, ask = _peer(ENVIRONMENTS[name])
        assert who["backend"] == name, f"{name} was asked for, {who['backend']} runs"
        found.append(Contender(name, ask, False))
    for name in ENVIRONMENTS.keys() - set(ASKED):
        tally.absent(f'{name} (asked for by WITH="{name}")')
    return tuple(found)
