"""The checks that many arguments share. Each raises with the argument's name, value and need."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # what kernels take

OWNERS = ("Tensor", "Parameter")  # the classes of tensors that have memory of their own
# torch has no public question for a tensor of a torch.func transform.
is_functorch: Callable[[Tensor], bool] = getattr(
    getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", lambda _: False
)


def describe(value: object) -> str:
    """What an argument is, for a message that refuses it."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    kind = type(value).__name__
    return f"{value!r} ({kind})" if isinstance(value, (int, float, str)) else f"a {kind}"


def check_floating(name: str, value: object) -> None:
    """Raises unless ``value`` is a dense tensor of a dtype that kernels take."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` is a {type(value).__name__}; it needs a tensor")
    if value.dtype not in FLOATING:
        raise TypeError(
            f"`{name}` has dtype {value.dtype}; it needs float64, float32, bfloat16 or float16"
        )
    check_dense(name, value)


def check_dense(name: str, value: Tensor) -> None:
    """Raises for a tensor that is no block of memory with strides: sparse, nested, freed, ..."""
    if torch.compiler.is_compiling():  # whose tensors have no memory to look at
        return
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"`{name}` is a {kind} tensor; it needs a dense one, with strides")
    owner = type(value).__name__ in OWNERS and not is_functorch(value)
    if owner and value.numel() and not value.untyped_storage().nbytes():
        raise ValueError(
            f"`{name}` has shape {tuple(value.shape)} but its memory was freed (its storage has "
            "0 bytes, as that of a sharded or offloaded tensor); it needs its values"
        )


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raises unless ``value`` is one of the allowed names."""
    if isinstance(value, str) and value in allowed:
        return
    got = repr(value) if value is None or isinstance(value, str) else describe(value)
    raise ValueError(f"`{name}` is {got}; it needs one of {', '.join(allowed)}")


def check_number(name: str, value: Any) -> float:
    """Returns ``value`` if it is a number, which a bool is not; else raises."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` is {describe(value)}; it needs a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def check_device(name: str, value: Any) -> torch.device | None:
    """Returns a device, or None; raises for what names none."""
    if value is None or isinstance(value, torch.device):
        return value
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        try:
            return torch.device(value)
        except (RuntimeError, ValueError, OverflowError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"`{name}` is {value!r}, which is no device: {reason}") from None
    raise TypeError(f"`{name}` is {describe(value)}; it needs a torch.device, or the name of one")
