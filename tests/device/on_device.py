"""The random problems of ``tests/problems.py`` on another device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from problems import Problem, problem, schedule

import guard_ops as go


def moved(given: Problem, device: torch.device) -> Problem:
    """The same numbers there, in the same layout."""
    out: Problem = {}
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            out[name] = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=device
            ).copy_(value)
        else:
            out[name] = value.to(device) if name == "coeffs" else value
    return out


def problem_on(
    device: torch.device, form: str = "velocity", **more: Any
) -> tuple[Problem, Problem]:
    """A problem on the CPU, and there; the reference makes its rollout."""
    with go.use_backend("reference"):
        given = problem(form, **more)
    return given, moved(given, device)


def rollout_on(device: torch.device, dtype: torch.dtype, latent: tuple[int, ...]) -> Problem:
    """A mean-form problem on policy, its rollout made by ``sde_step`` on the device."""
    v, x, noise = (torch.randn(3, 4, *latent).to(device, dtype) for _ in range(3))
    coeffs = schedule()[1:4].to(device)
    step = go.sde_step(v, x, coeffs, noise=noise)
    return {
        "model_output": v,
        "sample": x,
        "prev_sample": step.prev_sample,
        "old_mean": step.mean,
        "coeffs": coeffs,
        "advantages": torch.randn(4).to(device),
    }


def capture(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of one call, after another that compiles; and the tensors that it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = step()
    return graph, written
