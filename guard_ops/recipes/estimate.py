"""What a run needs, worked out without loading a weight: ``guard-ops train ... --dry-run``.

Parameters are counted, and the activations that a backward keeps are summed up, on the network
itself without values (torch's meta device). Attention is counted as a fused kernel keeps it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..policies import PipelinePolicy

GIB = 2**30


class Activations(NamedTuple):
    """Of one sample's velocity at one step, with guidance; in bytes."""

    kept: int  # everything that a backward keeps, without checkpointing
    checkpointed: int  # what it keeps where blocks are recomputed: their inputs, and the rest
    block: int  # the largest block's, recomputed one at a time
    flops: float  # of the forward

    def peak(self, checkpointing: bool) -> int:
        return self.checkpointed + self.block if checkpointing else self.kept


class Memory(NamedTuple):
    """Bytes on one GPU, by what they are for."""

    frozen_weights: int
    trained_weights: int
    gradients: int
    optimizer: int
    average: int
    unsharded_blocks: int
    cast_weights: int  # where float32 weights are not sharded: autocast's, kept for the backward
    activations: int
    rollout: int
    conditions: int

    @property
    def total(self) -> int:
        return sum(self)


def parameters(policy: PipelinePolicy) -> tuple[int, int]:
    """How many are trained, and how many frozen."""
    counts = [0, 0]
    for p in policy.parameters():
        counts[not p.requires_grad] += p.numel()
    return counts[0], counts[1]


def condition_like(policy: PipelinePolicy, batch: int = 1) -> dict[str, Tensor]:
    """A condition of the right shapes on the meta device."""
    config, s = policy.transformer.config, policy.settings
    widths = {
        "sd3": ("joint_attention_dim", 77 + s.text_length),
        "flux": ("joint_attention_dim", s.text_length),
        "wan": ("text_dim", s.text_length),
        "qwen_image": ("joint_attention_dim", s.text_length),
    }
    name, length = widths[policy.backbone]
    values = {"prompt": torch.empty(batch, length, config[name], dtype=s.dtype, device="meta")}
    if policy.backbone in ("sd3", "flux"):
        width = config["pooled_projection_dim"]
        values["pooled"] = torch.empty(batch, width, dtype=s.dtype, device="meta")
    if policy.backbone == "qwen_image":
        values["mask"] = torch.empty(batch, length, dtype=torch.bool, device="meta")
    return values


def activations(policy: PipelinePolicy) -> Activations:
    """Runs ``policy``, which is on the meta device, on one sample."""
    counted = _Counted(policy)
    condition = condition_like(policy)
    policy.set_negative(condition)
    latents = torch.empty(1, *policy.latent_shape, device="meta")
    timestep = torch.empty(1, device="meta")
    checkpointing = policy.transformer.is_gradient_checkpointing
    policy.transformer.disable_gradient_checkpointing()
    try:
        with counted.watching(), FlopCounterMode(display=False) as flops, _fused_attention(counted):
            policy.velocity(latents, timestep, condition)
    finally:
        if checkpointing:
            policy.transformer.enable_gradient_checkpointing()
    return counted.result(flops.get_total_flops())


class _Counted:
    """Bytes of the tensors that autograd keeps, by the block in which they were made."""

    def __init__(self, policy: PipelinePolicy) -> None:
        self._blocks = list(policy.blocks)
        self._known = {p.untyped_storage()._cdata for p in policy.parameters()}
        self._known |= {b.untyped_storage()._cdata for b in policy.buffers()}
        self._alive: list[Tensor] = []  # a storage's address is not used again
        self._inside: dict[int | None, int] = {}
        self._block: int | None = None
        self._inputs = 0
        self._seen_inputs: set[int] = set()
        self.attention_flops = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        for number, block in enumerate(self._blocks):
            handles.append(block.register_forward_pre_hook(self._enter(number), with_kwargs=True))
            handles.append(block.register_forward_hook(lambda *_: self._leave()))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, number: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._block = number
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor) and value.requires_grad:
                    key = value.untyped_storage()._cdata
                    if key not in self._seen_inputs:
                        self._seen_inputs.add(key)
                        self._alive.append(value)
                        self._inputs += value.numel() * value.element_size()

        return hook

    def _leave(self) -> None:
        self._block = None

    def _pack(self, value: Tensor) -> Tensor:
        key = value.untyped_storage()._cdata
        if key not in self._known:
            self._known.add(key)
            self._alive.append(value)
            size = value.untyped_storage().nbytes()
            self._inside[self._block] = self._inside.get(self._block, 0) + size
        return value

    def result(self, flops: float) -> Activations:
        blocks = [size for number, size in self._inside.items() if number is not None]
        outside = self._inside.get(None, 0)
        return Activations(
            outside + sum(blocks),
            outside + self._inputs,
            max(blocks, default=0),
            flops + self.attention_flops,
        )


@contextmanager
def _fused_attention(counted: _Counted) -> Iterator[None]:
    """On the meta device torch has only the attention that keeps all weights; count a fused one."""

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = torch.empty_like(q)
            log_sums = q.new_empty(q.shape[:-1], dtype=torch.float32)
            ctx.save_for_backward(q, k, v, out, log_sums)
            counted.attention_flops += 4 * q.numel() * k.shape[-2]
            return out

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            raise NotImplementedError

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return Fused.apply(query, key, value)  # type: ignore[no-untyped-call]

    original = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = original


def memory(
    policy: PipelinePolicy,
    activation: Activations,
    *,
    gpus: int,
    sharded: bool,
    samples: int,  # of an iteration, on all GPUs
    steps: int,
    trained_steps: int,
    micro_batch: int,
) -> Memory:
    """What each GPU holds at the peak of an update."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    frozen = [p for p in policy.parameters() if not p.requires_grad]
    shares = gpus if sharded else 1

    def share(size: float) -> int:
        return math.ceil(size / shares)

    numbers = sum(p.numel() for p in trained)
    mine = -(-samples // gpus)
    latent = math.prod(policy.latent_shape)
    itemsize = policy.settings.dtype.itemsize
    dtype, full = policy.settings.dtype, not policy.has_lora
    block = max((sum(p.numel() for p in b.parameters()) for b in policy.blocks), default=0)
    per_sample = (steps + 1) * 4 + steps * itemsize + 2 * trained_steps * itemsize
    text = sum(t.numel() * t.element_size() for t in condition_like(policy).values())
    return Memory(
        # in full fine-tuning the frozen copy for a KL term, in float32 as the trained weights
        frozen_weights=share(sum(p.numel() * (4 if full else p.element_size()) for p in frozen)),
        trained_weights=share(4 * numbers),
        gradients=share(4 * numbers),
        optimizer=share(8 * numbers),
        average=share(4 * numbers),  # at any decay, 0 included
        unsharded_blocks=2 * itemsize * block if sharded and gpus > 1 else 0,
        cast_weights=itemsize * (block if policy.settings.checkpointing else numbers)
        if full and dtype != torch.float32 and not (sharded and gpus > 1)
        else 0,
        activations=micro_batch * activation.peak(policy.settings.checkpointing),
        rollout=mine * latent * per_sample,
        conditions=mine * text,
    )
