"""FlowPolicy: all that the trainer asks of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn

Condition: TypeAlias = Mapping[str, Tensor]
"""What a prompt becomes: every tensor [B, ...], of one length whatever the prompt."""


class Schedule(NamedTuple):
    """A sampler's N steps, as the model's own scheduler has them."""

    sigmas: tuple[float, ...]  # N + 1, falling; the last is 0
    timesteps: Tensor  # [N], what `velocity` is handed


@runtime_checkable
class FlowPolicy(Protocol):
    """A flow-matching model.

    Parameters with ``requires_grad`` are trained, averaged and checkpointed under their names; so
    a LoRA on a frozen base costs a LoRA's memory and a LoRA's checkpoint.

    Latents are float32, or of the dtype ``latent_dtype`` if the policy has that attribute.

    A policy that is to be sharded is an ``nn.Module``, or has the attributes ``network``, the
    module that holds all parameters, and ``blocks``, the modules in it that are gathered one at a
    time; without ``blocks`` these are the members of each ``nn.ModuleList``. Its parameters may be
    on the device "meta" if it has a method ``load_weights()``, which is called when they have
    memory, of which each rank of a sharded policy has its part.
    """

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent, without the batch."""

    def schedule(self, steps: int) -> Schedule:
        """The sampler of so many steps."""

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The condition of each prompt, every tensor [B, ...] of a length of its own."""

    def velocity(
        self,
        latents: Tensor,  # [B, *latent]
        timestep: Tensor,  # [B] of `schedule().timesteps`; samples may be at different ones
        condition: Condition,
    ) -> Tensor:
        """``noise - image`` as the model predicts it, [B, *latent].

        Guidance, if any, is applied inside. The same inputs must give the same velocity (no
        dropout): the ratio compares two calls.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in [0, 1], floating: [B, 3, H, W], or [B, F, 3, H, W] of a video."""

    def reference(self) -> AbstractContextManager[None]:
        """Inside, ``velocity`` is that of the policy before training; for ``kl_beta``."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As ``nn.Module.named_parameters``."""


class Scores(NamedTuple):
    """What a reward says of B samples."""

    total: Tensor  # [B], what training raises
    parts: dict[str, Tensor]  # each [B]; NaN where a part is not of a sample


Reward: TypeAlias = Callable[[Tensor, Sequence[str], Sequence[Mapping[str, Any]]], Tensor | Scores]
"""``(pixels, prompts, metadata) -> [B]`` floating, or :class:`Scores`; larger is better.

With an attribute ``advantage_weights``, numbers by the names of its parts, the advantages are made
of each part and then added with these weights (GDPO), instead of being made of the total.
"""


def trainable(policy: FlowPolicy) -> dict[str, nn.Parameter]:
    """The policy's parameters that require grad, by name."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def take(condition: Condition, rows: Tensor) -> dict[str, Tensor]:
    """The conditions of some samples."""
    return {name: value[rows] for name, value in condition.items()}
