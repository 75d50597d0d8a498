"""Values that an argument should not have, made from one that it may have."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Meaningless:
    """An object that no argument of any function takes."""

    def __repr__(self) -> str:
        return "Meaningless()"


# No argument takes these: a call with one of them must be refused.
NEVER: dict[str, Any] = {
    "object": Meaningless(),
    "type": Meaningless,
    "function": lambda: None,
    "bytes": b"\xff\x00",
    "complex": 1 + 2j,
    "set": {1, 2},
}
PLAIN: dict[str, Any] = {
    "none": None,
    "true": True,
    "zero": 0,
    "minus one": -1,
    "seven": 7,
    "2^63": 2**63,
    "2^70": 2**70,
    "-2^70": -(2**70),
    "half": 0.5,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "1e39": 1e39,
    "1e308": 1e308,
    "5e-324": 5e-324,
    "empty text": "",
    "text": "mean ",
    "surrogate": "\ud800",
    "empty list": [],
    "list": [1, 0],
    "ragged": [[1.0], [2.0, 3.0]],
    "list of none": [None],
    "tuple": (-1, 2),
    "dict": {"count": 1},
    "range": range(2),
    "slice": slice(None, None, -1),
    "ellipsis": ...,
    "dtype": torch.float32,
    "numpy": np.ones((3, 4)),
    "numpy scalar": np.float64(0.5),
    "empty tensor": torch.empty(0),
    "scalar tensor": torch.tensor(0.5),
    "int tensor": torch.tensor([[1, 2], [3, 1]]),
    "huge int tensor": torch.tensor([2**62, -(2**62)]),
    "six dimensions": torch.zeros(1, 2, 1, 2, 1, 2),
}


def _freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def _conjugate(x: Tensor) -> Tensor:
    return torch.complex(x.float(), x.float()).conj()


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "bool": lambda x: x > 0,
    "int64": lambda x: x.to(torch.int64),
    "uint8": lambda x: x.to(torch.uint8),
    "complex64": lambda x: x.to(torch.complex64),
    "conjugate": _conjugate,
    "float8": lambda x: x.float().to(torch.float8_e4m3fn),
    "one short": lambda x: x[..., :-1],
    "one long": lambda x: torch.cat([x, x[..., :1]], -1),
    "unsqueezed": lambda x: x.unsqueeze(0),
    "first": lambda x: x[0],
    "flat": lambda x: x.flatten(),
    "swapped": lambda x: x.transpose(0, -1),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: x.reshape(-1, x.shape[-1]).to_sparse_csr(),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "jagged": lambda x: torch.nested.nested_tensor([x.flatten(), x.flatten()], layout=torch.jagged),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "requires grad": lambda x: x.clone().requires_grad_(),
    "history": lambda x: x.clone().requires_grad_() * 1.0,
    "parameter": lambda x: torch.nn.Parameter(x.clone()),
    "nan": lambda x: torch.full_like(x, math.nan),
    "inf": lambda x: torch.full_like(x, math.inf),
    "largest": lambda x: torch.full_like(x, torch.finfo(x.dtype).max),
    "negative zero": lambda x: torch.full_like(x, -0.0),
    "expanded": lambda x: x.new_ones(()).expand(x.shape),
    "inference": lambda x: torch.inference_mode()(torch.clone)(x),
    "negated view": lambda x: torch._neg_view(x),
    "list": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "double": lambda x: x.double(),
    "half": lambda x: x.half(),
    "freed": _freed,
}
OF_FLOATS = ("requires grad", "history", "parameter", "nan", "inf", "largest", "negative zero")


def changes(x: Tensor) -> list[str]:
    """The names of the changes that a tensor of this dtype can have."""
    return sorted(name for name in CHANGES if x.is_floating_point() or name not in OF_FLOATS)
