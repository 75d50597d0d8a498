"""Runs of several ranks, each a process of its own."""

from __future__ import annotations

import datetime
import os
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from guard_ops.trainer import Engine

# Processes are forks of one that has imported what they need, which takes longer than most of what
# they do. There is one such process in each that runs tests.
PROCESSES = mp.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch._dynamo", "sklearn.linear_model", "guard_ops.digits.jobs"])


def _worker(rank: int, ranks: int, folder: str, sharding: str, timeout: float, work, arguments):
    torch.set_num_threads(1)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(ranks)
    if ranks > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=timeout),
        )
    try:
        result = work(Engine(sharding, "cpu", reduce_dtype=torch.float64), *arguments)
        if result is not None:
            torch.save(result, f"{folder}/{rank}.pt")
        if ranks > 1:
            dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        os._exit(3)  # no farewell to the others, who may be gone


def run(folder: Path, ranks: int, work, *arguments, sharding="ddp", timeout=60.0, join=True):
    """What each rank's ``work(engine, *arguments)`` returned, or the processes without ``join``."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        PROCESSES.Process(
            target=_worker, args=(rank, ranks, str(folder), sharding, timeout, work, arguments)
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    if not join:
        return processes
    for rank, process in enumerate(processes):
        process.join(240)
        error = folder / f"{rank}.error"
        assert process.exitcode == 0, error.read_text() if error.exists() else process.exitcode
    found = [folder / f"{rank}.pt" for rank in range(ranks)]
    return [torch.load(path) if path.exists() else None for path in found]
