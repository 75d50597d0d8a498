"""The tensors of a sharded model's checkpoint: each rank writes its own part, any number read them.

They are safetensors files of torch.distributed.checkpoint, each with the place of its parts in the
whole tensors. No pickle is written or read.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

_PREFIX, _BETWEEN = "shard-", "/"


def is_shard(name: str) -> bool:
    """Whether a file has a part of each tensor."""
    return name.startswith(_PREFIX)


def write(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], alone: bool) -> None:
    """Write this rank's part; every rank has to call."""
    flat = {
        f"{kind}{_BETWEEN}{name}": value.detach()
        for kind, group in tensors.items()
        for name, value in group.items()
    }
    for name, value in flat.items():
        if not isinstance(value, Tensor):  # which the writer would pickle
            raise TypeError(f"{name} is a {type(value).__name__}; a checkpoint has tensors only")
    state_dict_saver.save(
        flat,
        storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
        no_dist=alone,
    )


def read(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], alone: bool) -> None:
    """Read into ``tensors``, sharded or not; every rank has to call."""
    flat = {
        f"{kind}{_BETWEEN}{name}": value.detach()
        for kind, group in tensors.items()
        for name, value in group.items()
    }
    reader = HuggingFaceStorageReader(str(folder))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is
        state_dict_loader.load(flat, storage_reader=reader, no_dist=alone)


def described(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors' shapes and dtypes, on the device "meta".

    Raises:
        ValueError: a tensor is of no kind, or the parts of one do not make a whole.
    """
    found: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    for name, each in metadata.state_dict_metadata.items():
        kind, _, rest = name.partition(_BETWEEN)
        if kind not in found or not isinstance(each, TensorStorageMetadata):
            raise ValueError(f"{folder} has a tensor {name!r}, which is none of a checkpoint's")
        parts = sum(math.prod(chunk.sizes) for chunk in each.chunks)
        if parts != math.prod(each.size):
            raise ValueError(f"{folder} has {parts} elements of {name!r}, of shape {each.size}")
        found[kind][rest] = torch.empty(each.size, dtype=each.properties.dtype, device="meta")
    return found
