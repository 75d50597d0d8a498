"""The bounds that loss plus gradient has to meet on a GPU, and those that a run missed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .cases import dtype_name
from .results import Row
from .workloads import Workload

LARGE = Workload("wan21_480p_step", "Wan2.1 480p, 81 frames", (16, 21, 60, 104), 16, 1, "one step")
SMALL = Workload("sd35_512_step", "SD3.5-M 512", (16, 64, 64), 8, 1, "one step")
DTYPES = {dtype_name(dtype): dtype for dtype in (torch.bfloat16, torch.float32)}
OBJECTIVES = ("article", "paper")


class Asked(NamedTuple):
    """The bounds of a backend, on loss plus gradient in bfloat16 in the mean form.

    The article's objective needs 336 MB of operands before its first gradient, so it reads them
    again. Its share of a copy's bandwidth is bounded twice: counting the bytes of one pass, and
    counting those that it has to move. The paper's objective needs one pass, and its share is
    bounded for the backend that takes one. All other bounds are on the article's.
    """

    share_of_copy: float  # the least share, on LARGE
    microseconds: float  # the most time of guard_loss_and_grad, on SMALL
    in_one_pass: tuple[str, ...]  # the objectives whose share is bounded


ASKED = {"triton": Asked(0.85, 12.0, ("article",)), "cuda": Asked(0.90, 8.0, OBJECTIVES)}
COUNTED = {"share_of_copy": "one pass", "moved_share_of_copy": "what has to move"}  # column: bytes
TIMES = {"eager": 20.0, "torch.compile": 2.5}  # how many times as fast as a chain Triton has to be
SLOWER = 1.05  # how many times Triton's time cuda may take, in any row of the mean form


def bounds(rows: Sequence[Row], backends: Sequence[str] = tuple(ASKED)) -> list[str]:
    """A sentence on each bound that is not met, or for which nothing was measured."""
    if not backends:
        return ["no backend here has kernels for the device"]
    found = {
        tuple(r[name] for name in ("workload", "dtype", "contender", "form", "objective")): r
        for r in rows
        if r.get("path", "chosen") == "chosen"
    }

    def number(
        name: str, workload: Workload, contender: str, dtype: str, objective: str
    ) -> float | None:
        known = found.get((workload.name, dtype, contender, "mean", objective), {})
        return known.get(name)

    missed = []
    of = ("bfloat16", "article")
    for backend in backends:
        share, us, in_one_pass = ASKED[backend]
        shares = [("share_of_copy", objective) for objective in in_one_pass]
        for column, objective in [*shares, ("moved_share_of_copy", "article")]:
            name = f"{list(LARGE.shape)} bf16 on {backend}, {objective}, {COUNTED[column]}"
            got = number(column, LARGE, backend, "bfloat16", objective)
            if got is None:
                missed.append(f"{name}: share of a copy not measured (asked: {share})")
            elif got < share:
                missed.append(f"{name}: {got:.2f} of a copy, not {share}")
        name = f"{list(SMALL.shape)} bf16 on {backend}"
        got = number("loss_and_grad_microseconds", SMALL, backend, *of)
        if got is None:
            missed.append(f"{name}: time not measured (asked: {us} microseconds)")
        elif got > us:
            missed.append(f"{name}: {got:.1f} microseconds, not {us}")
    if "triton" in backends:
        for workload in (LARGE, SMALL):
            ours = number("microseconds", workload, "triton", *of)
            for chain, wanted in TIMES.items():
                name = f"{list(workload.shape)} bf16 on triton"
                theirs = number("microseconds", workload, chain, *of)
                if ours is None or theirs is None:
                    missed.append(f"{name}: times {chain} not measured (asked: {wanted})")
                elif theirs / ours < wanted:
                    times = f"{theirs / ours:.1f} times {chain}"
                    missed.append(f"{name}: {times} (graph replay), not {wanted}")
    if "triton" in backends and "cuda" in backends:
        for workload, dtype, objective in (
            (w, d, o) for w in (LARGE, SMALL) for d in DTYPES for o in OBJECTIVES
        ):
            cuda, triton = (
                number("microseconds", workload, name, dtype, objective)
                for name in ("cuda", "triton")
            )
            name = f"{list(workload.shape)} {dtype}, {objective}: cuda"
            if cuda is None or triton is None:
                missed.append(f"{name} against triton not measured")
            elif cuda > SLOWER * triton:
                missed.append(f"{name} takes {cuda / triton:.2f} of triton's time, not {SLOWER}")
    return missed
