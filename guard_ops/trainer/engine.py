"""Where training runs: the device, the ranks, and how they share a model. No other file knows one.

    torchrun --nproc-per-node 8 -m guard_ops train ...      (or accelerate launch)

With ``sharding="ddp"`` every rank holds the whole model and gradients are summed after an update's
last backward: for a LoRA. With ``"fsdp"`` parameters, gradients and the optimizer are sharded
(FSDP2) and each backward reduces its gradients: for full fine-tuning.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import guard_ops as go

from .folder import RunFolderError
from .policy import Condition, FlowPolicy

Sharding = Literal["ddp", "fsdp"]
T = TypeVar("T")


class _Velocity(nn.Module):
    """``policy.velocity`` as a module's forward, which is what DistributedDataParallel takes."""

    def __init__(self, policy: FlowPolicy, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self._policy = [policy]  # not a submodule: its parameters are these, under other names
        for n, parameter in enumerate(parameters):
            self.register_parameter(f"p{n}", parameter)

    def forward(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        return self._policy[0].velocity(latents, timestep, condition)


class Engine:
    """The ranks of this run; one without a launcher.

    Args:
        sharding: "ddp" or "fsdp", of no meaning for one rank.
        device: default: this rank's GPU, else the CPU.
        param_dtype, reduce_dtype: FSDP2's mixed precision; None leaves the parameters' own.
        timeout: seconds after which a rank that waits for another one ends with an error.

    Raises:
        ValueError: ``sharding`` is neither.
    """

    def __init__(
        self,
        sharding: Sharding = "ddp",
        device: torch.device | str | None = None,
        *,
        param_dtype: torch.dtype | None = None,
        reduce_dtype: torch.dtype | None = None,
        timeout: float = 600.0,
    ) -> None:
        if sharding not in ("ddp", "fsdp"):
            raise ValueError(f"`sharding` is {sharding!r}; it needs 'ddp' or 'fsdp'")
        self.sharding, self._dtypes = sharding, (param_dtype, reduce_dtype)
        cuda = torch.cuda.is_available() and (device is None or torch.device(device).type == "cuda")
        if device is None:
            local = os.environ.get("LOCAL_RANK", "0")
            device = f"cuda:{local}" if cuda else "cpu"
        self.device = torch.device(device)
        if cuda:
            torch.cuda.set_device(self.device)
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                timeout=datetime.timedelta(seconds=timeout),
            )
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        self.group = None if alone else dist.group.WORLD
        self.rank = 0 if alone else dist.get_rank()
        self.ranks = 1 if alone else dist.get_world_size()
        self._wrapped: DistributedDataParallel | None = None
        self._velocity: Callable[[Tensor, Tensor, Condition], Tensor] | None = None

    # --- the model ---------------------------------------------------------------------------

    def wrap(self, policy: FlowPolicy) -> None:
        """Share the policy among the ranks; its parameters may become others (DTensors).

        Weights that are on "meta" until now are read here, when each rank has its part alone.
        """
        if self.group is not None and self.sharding == "fsdp":
            self._shard(policy)
        if any(p.is_meta for _, p in policy.named_parameters()):
            self._load(policy)
        self._velocity = policy.velocity
        if self.group is None or self.sharding == "fsdp":
            return
        trained = (p for _, p in policy.named_parameters() if p.requires_grad)
        # A copy of the gradients in buckets would cost their size once more.
        self._wrapped = DistributedDataParallel(
            _Velocity(policy, trained), process_group=self.group, gradient_as_bucket_view=True
        )

    def _load(self, policy: FlowPolicy) -> None:
        """Give memory to what is on "meta", and have the policy read its weights into it."""
        load = getattr(policy, "load_weights", None)
        if load is None:
            raise TypeError(
                f"`policy` is a {type(policy).__name__} with parameters on 'meta'; it needs a "
                "method `load_weights` that fills them"
            )
        network(policy)._apply(
            lambda t: torch.empty_like(t, device=self.device) if t.is_meta else t
        )
        load()

    def _shard(self, policy: FlowPolicy) -> None:
        from torch.distributed.fsdp import (
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        root = network(policy)
        options: dict[str, Any] = {
            "mp_policy": MixedPrecisionPolicy(*self._dtypes, cast_forward_inputs=False),
            # Also the root's: kept whole after a forward without a backward, it would be stale
            # when weights are written afterwards.
            "reshard_after_forward": True,
        }
        for block in getattr(policy, "blocks", None) or _blocks(root):
            fully_shard(block, **options)
        fully_shard(root, **options)
        if root is policy:  # type: ignore[comparison-overlap]
            register_fsdp_forward_method(root, "velocity")

    def velocity(
        self, latents: Tensor, timestep: Tensor, condition: Condition, *, last: bool = True
    ) -> Tensor:
        """The policy's velocity for a backward, ``last`` if it is the update's last one."""
        if self._wrapped is None:
            assert self._velocity is not None
            return self._velocity(latents, timestep, condition)
        with nullcontext() if last else self._wrapped.no_sync():
            result: Tensor = self._wrapped(latents, timestep, condition)
        return result

    def backward(self, velocity: Tensor, gradient: Tensor, *, last: bool = True) -> None:
        """Adds to the parameters' gradients, which are averaged over ranks at the last."""
        with nullcontext() if last or self._wrapped is None else self._wrapped.no_sync():
            torch.autograd.backward(velocity, gradient)

    def clip(self, parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
        """Scales the gradients down to a norm of ``largest``; returns the norm they had.

        If that is not finite they become 0, so that an optimizer's step leaves the weights finite;
        nothing waits for the device.
        """
        held = list(parameters)
        norm = torch.nn.utils.clip_grad_norm_(held, largest)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        unusable = norm.isfinite().logical_not()
        for parameter in held:
            if parameter.grad is not None:
                local(parameter.grad).masked_fill_(unusable, 0)
        return norm

    def weight(self, samples: int, out: go.LossAndGrad, config: go.GuardConfig) -> Tensor:
        """What makes the mean of the ranks' losses the mean over all their samples, []."""
        if self.group is None:
            return torch.ones((), dtype=torch.float64, device=self.device)
        if config.nonfinite == "drop":
            samples = out.excess.isfinite().any(0).sum()  # type: ignore[assignment]
        return go.rank_weight(samples, self.group, self.device)

    # --- the ranks ---------------------------------------------------------------------------

    def sum(self, value: Tensor) -> Tensor:
        """The sum of the ranks' values, in the order of ranks: the same bits on each."""
        if self.group is None:
            return value
        parts = [torch.empty_like(value) for _ in range(self.ranks)]
        dist.all_gather(parts, value.contiguous(), group=self.group)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def joined(self, value: Tensor) -> Tensor:
        """The ranks' values, each 0 where another's is not, added in place: no rank holds two."""
        if self.group is not None:
            dist.all_reduce(value, group=self.group)
        return value

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.group is not None:
            dist.barrier(group=self.group)

    def first(self, work: Callable[[], T]) -> T:
        """Rank 0 does ``work``; every rank returns its result, or raises what it raised."""
        if self.group is None:
            return work()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error
                dist.broadcast_object_list([None, _portable(error)], src=0, group=self.group)
                raise
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error inside the block, on any rank, is one on all of them."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        texts = self.gather(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, text in enumerate(texts):
            if text is not None:
                raise RunFolderError(f"rank {rank}: {text}")

    def gather(self, value: T) -> list[T]:
        """Every rank's value."""
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, value, group=self.group)
        return found

    def close(self) -> None:
        """Leave the other ranks."""
        if dist.is_initialized() and self.group is not None:
            dist.destroy_process_group()
            self.group = None


def network(policy: FlowPolicy) -> nn.Module:
    """The module that holds the policy's parameters."""
    found = getattr(policy, "network", policy)
    if not isinstance(found, nn.Module):
        raise TypeError(
            f"`policy` is a {type(policy).__name__}; to be sharded it needs to be an nn.Module, or "
            "to have one as `network`"
        )
    return found


def local(value: Tensor) -> Tensor:
    """What this rank holds of a tensor; writing to it writes to the tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole(value: Tensor) -> Tensor:
    """A sharded tensor in full; every rank has to ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def fill(value: Tensor, full: Tensor) -> None:
    """Write ``full``, or this rank's part of it, into ``value``."""
    if isinstance(value, DTensor):
        full = distribute_tensor(full.to(value.device), value.device_mesh, value.placements)
        value.to_local().copy_(full.to_local())
    else:
        value.copy_(full)


def sharded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any tensor is sharded."""
    return any(isinstance(value, DTensor) for value in tensors.values())


def _blocks(root: nn.Module) -> list[nn.Module]:
    """The members of the outermost ``nn.ModuleList``s."""
    found: list[nn.Module] = []
    for child in root.children():
        found += list(child) if isinstance(child, nn.ModuleList) else _blocks(child)
    return found


def _portable(error: Exception) -> Exception:
    """An error of the same type with the same message, if another process can make it."""
    try:
        return type(error)(str(error))
    except Exception:
        return RuntimeError(str(error))
