"""Allocates what the operators return; while torch traces, this only describes it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..objective import Metrics
from ..transitions import Latents, compute_dtype

Operands = list[Tensor | None]  # Transitions.latents as a list, as operators take them


def named(latents: Operands) -> Latents:
    """The group again, of which an operator takes the list."""
    return Latents._make(latents)


def sums(latents: Operands) -> Tensor:
    """[3, K, B] float64."""
    v = named(latents).model_output
    return v.new_empty((3, *v.shape[:2]), dtype=torch.float64)


def gradients(latents: Operands, cond: bool, uncond: bool) -> tuple[Tensor, Tensor]:
    """Where the gradients go: each like its branch, or empty where it is not wanted."""
    v, uncond_output = named(latents).model_output, named(latents).model_output_uncond
    like = uncond_output if uncond else None
    return (
        torch.empty_like(v) if cond else v.new_empty(0),
        v.new_empty(0) if like is None else torch.empty_like(like),
    )


def loss(latents: Operands, cond: bool, uncond: bool) -> tuple[Tensor, ...]:
    """loss [], grad, grad_uncond, per_row [4, K, B], metrics [11, K], d loss / d sums [3, K, B]."""
    v = named(latents).model_output
    wide = compute_dtype(*named(latents).present())
    per_row = v.new_empty((4, *v.shape[:2]), dtype=wide)
    return (
        per_row.new_empty(()),
        *gradients(latents, cond, uncond),
        per_row,
        per_row.new_empty((len(Metrics._fields), v.shape[0])),
        sums(latents),
    )


def evaluation(latents: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of :func:`loss`, all but the gradients."""
    loss_, _, _, per_row, metrics, sum_grads = loss(latents, False, False)
    return loss_, per_row, metrics, sum_grads


def statistics(latents: Operands) -> Tensor:
    """[5, K] float64."""
    v = named(latents).model_output
    return v.new_empty((5, v.shape[0]), dtype=torch.float64)


def step(latents: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """prev_sample and mean [K, B, D], and sum((prev_sample - mean)^2) [K, B] float64."""
    x, wide = named(latents).sample, compute_dtype(*named(latents).present())
    assert x is not None
    square = x.new_empty(x.shape[:2], dtype=torch.float64)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=wide), square
