"""Which elements of a latent count: the ``mask`` of a call, and how many elements it leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checks import FLOATING, check_dense

if TYPE_CHECKING:
    from .transitions import CallShape


def flat(mask: Tensor, shape: CallShape, device: torch.device) -> Tensor:
    """Checks a mask and views it as [K, B, D] bool, with stride 0 where it does not vary.

    It is ``[*latent]``, or that behind one or both of K and B, each of which may be 1. A bool mask
    is read in place if its latents are dense; of a floating one, ``mask != 0`` is formed.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"`mask` is a {type(mask).__name__}; it needs a tensor")
    if mask.dtype != torch.bool and mask.dtype not in FLOATING:
        raise TypeError(f"`mask` has dtype {mask.dtype}; it needs torch.bool, or a floating dtype")
    check_dense("mask", mask)
    leading = len(shape.leading())
    own = mask.ndim - (len(shape.full) - leading)  # how many of K and B it has
    fits = 0 <= own <= leading and mask.shape[own:] == shape.full[leading:]
    of_call = shape.full[leading - own : leading] if fits else ()
    if not fits or any(n not in (1, size) for n, size in zip(mask.shape, of_call, strict=False)):
        names = "[*latent] or [B or 1, *latent]"
        if not shape.one_step:
            names = "[*latent], [B or 1, *latent] or [K or 1, B or 1, *latent]"
        raise ValueError(
            f"`mask` has shape {tuple(mask.shape)}; with `model_output` of shape {shape.full} it "
            f"needs {names}"
        )
    if mask.device != device:
        raise ValueError(f"`mask` is on {mask.device} but `model_output` on {device}")
    if mask.requires_grad and torch.is_grad_enabled():
        raise ValueError("`mask` requires grad but is a constant of the loss; detach it")
    counted = mask if mask.dtype == torch.bool else mask != 0
    counted = counted.reshape(*counted.shape[:own], -1)
    if counted.stride(-1) != 1 and counted.shape[-1] != 1:
        counted = counted.contiguous()
    return counted.expand(shape.steps, shape.batch, -1)


def counts(mask: Tensor) -> Tensor:
    """How many elements of each transition count, [K, B] float64.

    ``mask``: as :func:`flat` gives it, of which only what varies is read.
    """
    own = tuple(1 if mask.stride(n) == 0 else mask.shape[n] for n in (0, 1))
    return mask[: own[0], : own[1]].sum(-1, dtype=torch.float64).expand(mask.shape[:2])
