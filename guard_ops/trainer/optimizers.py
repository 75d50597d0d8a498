"""An optimizer's state as named tensors and JSON, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of its state as "<index>.<name>"."""
    return {
        f"{index}.{name}": value
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def numbers(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The rest, for JSON: parameter groups, and what in its state is no tensor."""
    state = optimizer.state_dict()
    rest = {
        str(index): {k: v for k, v in values.items() if not isinstance(v, Tensor)}
        for index, values in state["state"].items()
    }
    result: dict[str, Any] = plain({"param_groups": state["param_groups"], "state": rest})
    return result


def settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its name, and each hyperparameter: a value, or a list of one for each group."""
    groups = [
        {k: v for k, v in group.items() if k != "params"} | {"parameters": len(group["params"])}
        for group in optimizer.param_groups
    ]
    values = {name: [group.get(name) for group in groups] for name in groups[0]}
    flat = {name: x[0] if len(x) == 1 else x for name, x in values.items()}
    result: dict[str, Any] = plain({"name": type(optimizer).__name__} | flat)
    return result


def like(tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Zeros of the kinds that :func:`tensors` gave, sharded as the optimizer's parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    result = {}
    for key, value in tensors.items():
        parameter = parameters[int(key.partition(".")[0])]
        if value.shape == parameter.shape and value.ndim:
            result[key] = torch.zeros_like(parameter, dtype=value.dtype)
        else:
            result[key] = torch.zeros_like(value, device="cpu")
    return result


def restore(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Put what :func:`tensors` and :func:`numbers` gave into an optimizer like that one."""
    state = {int(index): dict(values) for index, values in numbers["state"].items()}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state[int(index)][name] = value
    groups = [
        {name: _like(now.get(name), value) for name, value in then.items()}
        for now, then in zip(optimizer.param_groups, numbers["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def plain(value: Any) -> Any:
    """``value`` as JSON gives it back: tensors and arrays are numbers, tuples are lists."""

    def number(x: Any) -> Any:
        if hasattr(x, "tolist"):
            return x.tolist()
        raise TypeError(f"{x!r} cannot be saved as JSON; a setting needs to be a number or text")

    return json.loads(json.dumps(value, default=number))


def _like(now: Any, saved: Any) -> Any:
    """``saved`` with the type of ``now``, where JSON has lost it: a tensor's or a tuple's."""
    if isinstance(now, Tensor):
        return torch.tensor(saved, dtype=now.dtype, device=now.device)
    if isinstance(now, tuple) and isinstance(saved, list) and len(now) == len(saved):
        return tuple(_like(a, b) for a, b in zip(now, saved, strict=True))
    return saved
