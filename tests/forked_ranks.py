"""Ranks of a process group, each a process forked from :mod:`fresh`'s interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fresh
import torch

PROGRAM = """
import importlib, os, signal, sys, traceback
module, ranks, folder, tests = sys.argv[1:]
ranks = int(ranks)
sys.path.insert(0, tests)
import emulated
if emulated.EMULATED:
    emulated.prepare()
import torch
import torch.distributed as dist
worker = importlib.import_module(module).worker

def run(rank):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    torch.save(worker(rank), f"{folder}/{rank}")
    dist.destroy_process_group()

children = set()
for rank in range(ranks):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run(rank)
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    children.add(child)
while children:
    child, status = os.wait()
    children.remove(child)
    if status:
        for other in children:  # would wait for it
            os.kill(other, signal.SIGKILL)
        raise SystemExit(f"a rank ended with {status}")
"""


def run(module: str, ranks: int, folder: Path) -> list[Any]:
    """What ``worker(rank)`` of a test module returned on each of so many gloo ranks."""
    fresh.run(PROGRAM, module, str(ranks), str(folder), str(Path(__file__).parent))
    return [torch.load(folder / str(rank)) for rank in range(ranks)]
