"""The ranks of a process group, as far as an op has to ask them for numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import check_dense, check_device, describe

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def check_group(name: str, group: Any) -> None:
    """Raises unless ``group`` is a process group, or None for all ranks, that has this rank."""
    if not dist.is_available():
        raise ValueError(f"`{name}` is given, but this build of torch has no torch.distributed")
    outside = group is dist.GroupMember.NON_GROUP_MEMBER
    if group is not None and not outside and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"`{name}` is a {type(group).__name__}; it needs a torch.distributed.ProcessGroup"
        )
    if not dist.is_initialized():
        raise ValueError(
            f"`{name}` is {'of all ranks' if group is None else 'given'}, but torch.distributed is "
            "not initialized; call init_process_group first"
        )
    if outside or dist.get_rank(group) < 0:
        raise ValueError(
            f"`{name}` does not have this rank ({dist.get_rank()}); only its own ranks can call "
            "with it"
        )


def gather(value: Tensor, group: ProcessGroup | None) -> Tensor:
    """Every rank's ``value``, which has one shape on all of them: [ranks, ...], in their order."""
    gathered = value.new_empty((dist.get_world_size(group), *value.shape))
    # some process groups take the result for a concatenation along the first dimension
    part = value.contiguous().unsqueeze(0)
    if hasattr(dist, "all_gather_single"):  # what newer versions of torch call it
        dist.all_gather_single(gathered, part, group=group)
    else:
        dist.all_gather_into_tensor(gathered, part, group=group)
    return gathered


def total(value: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of every rank's ``value``, which all of them form alike and so to the same bits."""
    return gather(value, group).sum(0)


def gather_uneven(value: Tensor, group: ProcessGroup | None) -> list[Tensor]:
    """Every rank's ``value`` [n], where n differs between ranks; the host waits for their sizes."""
    size = torch.tensor([len(value)], device=value.device)
    sizes = gather(size, group).flatten().tolist()
    padded = value.new_zeros(max(sizes))
    padded[: len(value)] = value
    parts = zip(gather(padded, group), sizes, strict=True)
    return [each[:n] for each, n in parts]


def rank_weight(
    samples: int | Tensor,
    process_group: ProcessGroup | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """What to multiply a rank's loss by where ranks have different numbers of samples.

    A loss is the mean over its rank's samples, and data parallelism averages the ranks' gradients,
    which is the mean over all samples only if every rank has as many. With this weight,
    ``samples * ranks / (all ranks' samples)``, it is in any case. (Not so for the KL term of a loss
    that drops transitions, which is a mean over the finite ones.)

    Args:
        samples: how many samples the rank's loss is a mean over: its B; with ``nonfinite="drop"``
            those that have a finite step, ``out.excess.isfinite().any(0).sum()``. The host does not
            wait for a tensor [].
        process_group: the ranks; None for all.
        device: where an int becomes a tensor, which has to be one that the group's ranks exchange:
            the loss's, for NCCL.

    Returns:
        [] float64, on the device of ``samples``, or on ``device`` for an int.

    Raises:
        TypeError, ValueError: ``samples`` is no count, or the group lacks this rank.
    """
    check_group("process_group", process_group)
    if isinstance(samples, Tensor):
        check_dense("samples", samples)
        if samples.ndim or samples.dtype.is_complex or samples.dtype == torch.bool:
            raise ValueError(f"`samples` is {describe(samples)}; it needs a number of shape []")
        mine = samples.double()
    elif isinstance(samples, bool) or not isinstance(samples, int):
        raise TypeError(f"`samples` is {describe(samples)}; it needs an int or a tensor []")
    elif not 0 <= samples < 2**53:
        raise ValueError(f"`samples` is {samples}; it needs 0 <= samples < 2**53")
    else:
        mine = torch.full((), samples, dtype=torch.float64, device=check_device("device", device))
    everybody = gather(mine, process_group)
    return mine * len(everybody) / everybody.sum().clamp(min=1)
