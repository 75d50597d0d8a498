"""How a rank's samples become the batches of its calls: as many on every rank, of one size.

Every rank makes the same number of calls of the network, as sharded parameters are gathered by all
ranks together. A batch that a rank cannot fill is filled up with copies of its last sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import draws
from .config import TrainConfig
from .draws import Share


class Minibatch(NamedTuple):
    """A rank's part of the samples of one update."""

    rows: Tensor  # [b] of the rank's samples
    most: int  # the largest b of any rank


def minibatches(
    shares: Sequence[Share], rank: int, config: TrainConfig, iteration: int, device: torch.device
) -> list[Minibatch]:
    """The updates of an iteration, ``minibatches`` for each epoch, in turn."""
    found = []
    for epoch in range(config.inner_epochs):
        of = draws.minibatch_of(config.samples, config.minibatches, config.seed, iteration, epoch)
        for number in range(config.minibatches):
            rows = [(of[s.first : s.last] == number).nonzero()[:, 0] for s in shares]
            most = max(len(each) for each in rows)
            found.append(Minibatch(rows[rank].to(device), most))
    return found


def chunk_size(shares: Sequence[Share], config: TrainConfig) -> int:
    """How many samples a call without a graph has: ``rollout_batch``, or an update's."""
    largest = max(len(share) for share in shares)
    return min(config.rollout_batch or -(-largest // config.minibatches), largest)


def padded(count: int, size: int, most: int, device: torch.device) -> list[Tensor]:
    """0 .. count - 1 in pieces of ``size``, as many as ``most`` need, filled up with the last."""
    pieces = -(-most // size)
    numbers = torch.arange(pieces * size, device=device).clamp(max=count - 1)
    return list(numbers.reshape(pieces, size).unbind(0))


class Trajectories(NamedTuple):
    latents: Tensor  # [N + 1, n, *latent]
    velocities: Tensor  # [N, n, *latent]
    filled: int  # how many of n are there


def append(
    whole: Trajectories | None, n: int, latents: list[Tensor], velocities: list[Tensor]
) -> Trajectories:
    """``whole`` with a chunk's trajectories, of which those beyond n are left out.

    Memory is taken once, when the first chunk has shown the dtypes.
    """
    if whole is None:
        both = [x[0].new_empty(len(x), n, *x[0].shape[1:]) for x in (latents, velocities)]
        whole = Trajectories(both[0], both[1], 0)
    end = min(n, whole.filled + len(latents[0]))
    for to, parts in ((whole.latents, latents), (whole.velocities, velocities)):
        for k, part in enumerate(parts):
            to[k, whole.filled : end] = part[: end - whole.filled]
    return whole._replace(filled=end)
