"""Puts a trainer's state into a checkpoint, and restores it from there."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint

if TYPE_CHECKING:
    from .loop import Trainer

# These settings may differ between a run and its continuation.
_FREE = ("iterations", "evaluate_every", "checkpoint_every", "keep_checkpoints", "tensorboard")


def tensors(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """For each file: weights, their average, the optimizer's state, the generators' states."""
    optimizer = {
        f"{index}.{name}": value
        for index, values in trainer.optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
    rng = {"trainer": trainer.generator.get_state(), "torch": torch.get_rng_state()}
    if trainer.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(trainer.device)
    return {
        "model": dict(trainer.parameters),
        "ema": trainer.ema.average,
        "optimizer": optimizer,
        "rng": rng,
    }


def numbers(trainer: Trainer, metrics_bytes: int) -> dict[str, Any]:
    """Everything that is not a tensor, for JSON."""
    optimizer = trainer.optimizer.state_dict()
    return {
        "settings": _settings(trainer),
        "ema_updates": trainer.ema.updates,
        "metrics_bytes": metrics_bytes,
        "optimizer": {
            "param_groups": optimizer["param_groups"],
            "state": {
                str(index): {k: v for k, v in values.items() if not isinstance(v, Tensor)}
                for index, values in optimizer["state"].items()
            },
        },
    }


@torch.no_grad()
def restore(trainer: Trainer, saved: Checkpoint) -> None:
    """Put ``saved`` into ``trainer``, all of it or (on an error) nothing.

    Raises:
        ValueError: the checkpoint is of a run with other settings or of another model.
    """
    _check(trainer, saved)
    for name, p in trainer.parameters.items():
        p.copy_(saved.tensors["model"][name])
        trainer.ema.average[name].copy_(saved.tensors["ema"][name])
    trainer.ema.updates = saved.state["ema_updates"]
    optimizer = saved.state["optimizer"]
    state = {int(index): dict(values) for index, values in optimizer["state"].items()}
    for key, value in saved.tensors["optimizer"].items():
        index, name = key.split(".", 1)
        state[int(index)][name] = value
    trainer.optimizer.load_state_dict({"state": state, "param_groups": optimizer["param_groups"]})
    rng = saved.tensors["rng"]
    trainer.generator.set_state(rng["trainer"])
    torch.set_rng_state(rng["torch"])
    if "cuda" in rng and trainer.device.type == "cuda":
        torch.cuda.set_rng_state(rng["cuda"], trainer.device)
    trainer.iteration = saved.iteration


def _settings(trainer: Trainer) -> dict[str, Any]:
    config = dataclasses.asdict(trainer.config)
    schedule = trainer.schedule
    settings = {
        "config": {name: value for name, value in config.items() if name not in _FREE},
        "guard": dataclasses.asdict(trainer.guard),
        "schedule": {
            "sigmas": schedule.sigmas,
            "noise_level": schedule.noise_level,
            "kind": schedule.kind,
        },
        "optimizer": {"name": type(trainer.optimizer).__name__},
    }
    result: dict[str, Any] = json.loads(json.dumps(settings))  # as it will be read back
    return result


def _check(trainer: Trainer, saved: Checkpoint) -> None:
    for part, now in _settings(trainer).items():
        then = saved.state["settings"][part]
        for name in now.keys() | then.keys():
            if now.get(name) != then.get(name):
                raise ValueError(
                    f"`{part}.{name}` is {now.get(name)!r} but the run in `out` was trained with "
                    f"{then.get(name)!r}; resume with the same or choose another `out`"
                )
    shapes = {name: tuple(p.shape) for name, p in trainer.parameters.items()}
    held = {name: tuple(p.shape) for name, p in saved.tensors["model"].items()}
    for name in shapes.keys() | held.keys():
        if shapes.get(name) != held.get(name):
            raise ValueError(
                f"`policy` has parameter {name!r} of shape {shapes.get(name)} but the checkpoint "
                f"{held.get(name)}; it is of another model"
            )
