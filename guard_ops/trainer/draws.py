"""All that an iteration draws, from (seed, iteration, sample) alone.

No generator has a state that goes on: a run that is resumed, or has another number of ranks, draws
the same prompts, latents, noise and minibatches for the same samples.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

import guard_ops as go
from guard_ops.ops import next_sample


def key(seed: int, iteration: int, what: str) -> int:
    """A key in [0, 2^63) of a counter-based generator, for one purpose of one iteration."""
    digest = hashlib.sha256(f"{seed} {iteration} {what}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, iteration: int, what: str) -> torch.Generator:
    """A generator on the CPU for one purpose of one iteration."""
    return torch.Generator().manual_seed(key(seed, iteration, what))


@dataclass(frozen=True)
class Share:
    """The samples first .. last - 1 of an iteration, which are one rank's."""

    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first


def shares(samples: int, minibatches: int, ranks: int) -> list[Share]:
    """Each rank's samples: blocks of as equal a size as whole rows of a minibatch's can have.

    A row is ``minibatches`` samples in a row, of which :func:`minibatch_of` puts one into each
    minibatch; the first row may be short. So every rank has a part of every minibatch.

    Raises:
        ValueError: there are too few samples for that.
    """
    if samples < ranks * minibatches:
        raise ValueError(
            f"`prompts_per_iteration` x `group_size` is {samples} samples; {ranks} ranks with "
            f"`minibatches` {minibatches} need at least {ranks * minibatches}"
        )
    rows = -(-samples // minibatches)
    short = rows * minibatches - samples  # what the first row lacks
    base, more = divmod(rows, ranks)
    ends = [(base * r + min(r, more)) * minibatches - short for r in range(ranks + 1)]
    return [Share(max(a, 0), b) for a, b in itertools.pairwise(ends)]


def minibatch_of(samples: int, minibatches: int, seed: int, iteration: int, epoch: int) -> Tensor:
    """The minibatch of each sample in a pass over them, [S]."""
    rows = -(-samples // minibatches)
    dice = generator(seed, iteration, f"minibatches of epoch {epoch}")
    order = torch.rand(rows, minibatches, generator=dice).argsort(1)
    return order.flatten()[rows * minibatches - samples :]


def groups(prompts: int, chosen: int, size: int, seed: int, iteration: int) -> Tensor:
    """The prompt of each sample, [chosen * size]: each chosen one ``size`` times, in random order.

    So a group's samples are on any ranks.
    """
    dice = generator(seed, iteration, "prompts")
    repeated = torch.randperm(prompts, generator=dice)[:chosen].repeat_interleave(size)
    return repeated[torch.randperm(len(repeated), generator=dice)]


def seeds(
    steps: int,
    samples: int,
    share: Share,
    seed: int,
    iteration: int,
    device: torch.device,
    leaders: Tensor | None = None,  # [S]: whose initial latents and first noise each sample has
    prefix: int = 0,  # the noise of how many steps that is
) -> Tensor:
    """Philox seeds [steps + 1, n, 2] of a rank's samples; the last row is the initial latents'."""
    every = go.philox_seed(key(seed, iteration, "noise"), (steps + 1, samples), device)
    mine = every[:, share.first : share.last]
    if leaders is None:
        return mine
    shared = every[:, leaders[share.first : share.last].to(device)]
    return torch.cat([shared[:prefix], mine[prefix:-1], shared[-1:]])


def leaders(groups: Tensor) -> Tensor:
    """The first sample of each sample's group, [S]."""
    first: dict[int, int] = {}
    return torch.tensor([first.setdefault(g, i) for i, g in enumerate(groups.tolist())])


def only_noise(device: torch.device) -> go.StepCoefficients:
    """A step to pure noise: ``y = 0 x + 0 v + 1 noise``."""
    table = torch.tensor([0.0, 0.0, 1.0, 0.5, -1.0], dtype=torch.float64).to(device)
    return go.StepCoefficients._of(table, True, ())


def normals(
    seeds: Tensor, shape: tuple[int, ...], dtype: torch.dtype, step: go.StepCoefficients
) -> Tensor:
    """The normals [n, *shape] of Philox seeds [n, 2], by the step :func:`only_noise`."""
    zero = torch.zeros(len(seeds), *shape, dtype=dtype, device=seeds.device)
    return next_sample(zero, zero, step, seed=seeds)
