"""FlowPolicy: all that the trainer asks of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn

Condition: TypeAlias = Mapping[str, Tensor]
"""What a velocity is conditioned on; every tensor is [B, ...], of fixed length."""


class Schedule(NamedTuple):
    """A sampler's steps."""

    sigmas: tuple[float, ...]  # N + 1 noise levels, falling; the last is 0
    timesteps: Tensor  # [N], what the velocity is handed at each: the scheduler's own


@runtime_checkable
class FlowPolicy(Protocol):
    """A flow-matching model; any ``nn.Module`` with ``latent_shape`` and ``velocity`` is one.

    Parameters with ``requires_grad`` are trained, averaged and checkpointed under their names; so
    a LoRA on a frozen base costs a LoRA's memory and a LoRA's checkpoint.
    """

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent, without the batch."""

    def velocity(
        self,
        latents: Tensor,  # [B, *latent]
        sigma: Tensor,  # [B] float32 in [0, 1]; a diffusers timestep is 1000 sigma
        condition: Tensor,  # [B, ...]: rows of the prompts the trainer was given
    ) -> Tensor:
        """``noise - image`` as the model predicts it, [B, *latent].

        Guidance, if any, is applied inside. The same inputs must give the same velocity (no
        dropout): the ratio compares two calls.
        """

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As ``nn.Module.named_parameters``."""


Reward: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``(samples [B, *latent], condition [B, ...]) -> [B]`` floating; larger is better."""


def trainable(policy: FlowPolicy) -> dict[str, nn.Parameter]:
    """The policy's parameters that require grad, by name."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}
