"""The ranks of a process group, as far as an op has to ask them for numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

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
    if outside or dist.get_rank(group) < 0:
        raise ValueError(
            f"`{name}` does not have this rank ({dist.get_rank()}); only its own ranks can call "
            "with it"
        )


def gather(value: Tensor, group: ProcessGroup | None) -> list[Tensor]:
    """Every rank's ``value``, which has the same shape on all of them, in the order of ranks."""
    value = value.contiguous()
    gathered = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, value, group=group)
    return gathered


def gather_uneven(value: Tensor, group: ProcessGroup | None) -> list[Tensor]:
    """Every rank's ``value`` [n], where n differs between ranks; the host waits for their sizes."""
    size = torch.tensor([len(value)], device=value.device)
    sizes = torch.cat(gather(size, group)).tolist()
    padded = value.new_zeros(max(sizes))
    padded[: len(value)] = value
    parts = zip(gather(padded, group), sizes, strict=True)
    return [each[:n] for each, n in parts]


def rank_weight(samples: int | Tensor, process_group: ProcessGroup | None = None) -> Tensor:
    """What to multiply a rank's loss by where ranks have different numbers of samples.

    A loss is the mean over its rank's samples, and data parallelism averages the ranks' gradients,
    which is the mean over all samples only if every rank has as many. With this weight,
    ``samples * ranks / (all ranks' samples)``, it is in any case.

    Args:
        samples: how many samples the rank's loss is a mean over: its B; with ``nonfinite="drop"``
            those that have a finite step, ``out.excess.isfinite().any(0).sum()``. A tensor [] stays
            on its device, and the host does not wait for it.
        process_group: the ranks; None for all.

    Returns:
        [] float64, on the device of ``samples``, or on the CPU for an int.

    Raises:
        TypeError, ValueError: ``samples`` is no count, or the group lacks this rank.
    """
    check_group("process_group", process_group)
    if isinstance(samples, Tensor):
        if samples.ndim:
            raise ValueError(f"`samples` has shape {tuple(samples.shape)}; it needs []")
        mine = samples.double()
    elif isinstance(samples, bool) or not isinstance(samples, int):
        raise TypeError(f"`samples` is a {type(samples).__name__}; it needs an int or a tensor []")
    else:
        mine = torch.tensor(samples, dtype=torch.float64)
    everybody = torch.stack(gather(mine, process_group))
    return mine * len(everybody) / everybody.sum().clamp(min=1)
