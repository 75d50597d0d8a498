"""Begins or continues a run: what its checkpoints hold, and what a continuation must share."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import checkpoint, optimizers
from .checkpoint import Checkpoint, CheckpointError
from .ema import Ema

if TYPE_CHECKING:
    from .loop import Trainer

# These settings may differ between a run and its continuation.
_FREE = ("iterations", "evaluate_every", "checkpoint_every", "keep_checkpoints", "tensorboard")
_SAMPLED = 1024  # bytes of each frozen parameter that tell it from another


class Saved(NamedTuple):
    """A checkpoint of a trainer, each part of its type."""

    iteration: int
    settings: dict[str, dict[str, Any]]
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    ema_updates: int
    optimizer_tensors: dict[str, Tensor]
    optimizer_numbers: dict[str, Any]
    rng: dict[str, Tensor]
    metrics: str  # the text of metrics.jsonl


def start(trainer: Trainer, resume: bool, initialize: Callable[[], object] | None) -> None:
    """Continue the run in ``trainer.out`` or begin one there.

    Raises:
        ValueError, CheckpointError: as the trainer says; no file is touched then.
    """
    root = trainer.checkpoints
    trainer.settings = _settings(trainer)
    saved: Saved | None = None
    unusable: list[checkpoint.Unusable] = []
    if resume:
        saved, unusable = checkpoint.newest(root, _understand)
        if saved is not None:
            _check(trainer, saved)
        elif unusable:
            reasons = "; ".join(one.reason for one in unusable)
            raise CheckpointError(f"no intact checkpoint to resume from: {reasons}")
    elif checkpoint.exist(root):
        raise ValueError(
            f"`out` is {str(trainer.out)!r}, which has checkpoints of another run; continue it "
            "with `resume=True` or choose another folder"
        )
    # What follows changes files.
    checkpoint.set_aside(unusable, "using the previous checkpoint")
    if saved is None and initialize is not None:
        initialize()
    trainer.ema = Ema(trainer.parameters, trainer.config.ema_decay)
    if saved is not None:
        _restore(trainer, saved)
    trainer.writer.start(trainer.iteration, saved.metrics if saved else None)
    if saved is None and trainer.config.checkpoint_every:
        save(trainer)  # marks the folder as taken; a run killed in its first seconds resumes here


def save(trainer: Trainer) -> Path:
    """Write a checkpoint; returns its folder."""
    rng = {"trainer": trainer.generator.get_state(), "torch": torch.get_rng_state()}
    if trainer.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(trainer.device)
    tensors = {
        "model": trainer.ema.weights(),
        "ema": trainer.ema.average,
        "optimizer": optimizers.tensors(trainer.optimizer),
        "rng": rng,
    }
    rest = {
        "settings": trainer.settings,
        "ema_updates": trainer.ema.updates,
        "optimizer": optimizers.numbers(trainer.optimizer),
        "metrics": trainer.writer.sync(),
    }
    keep = trainer.config.keep_checkpoints
    return checkpoint.save(trainer.checkpoints, trainer.iteration, tensors, rest, keep)


def _understand(saved: Checkpoint) -> Saved:
    """A checkpoint's parts; raises where one is not there or not of its type."""
    state, tensors = saved.state, saved.tensors
    model, ema, rng = tensors["model"], tensors["ema"], tensors["rng"]
    settings, numbers = state["settings"], state["optimizer"]
    if {k: v.shape for k, v in model.items()} != {k: v.shape for k, v in ema.items()}:
        raise ValueError("the weights and their average are of different models")
    if not all(isinstance(part, dict) for part in settings.values()):
        raise TypeError("its settings are not in parts")
    for key in tensors["optimizer"]:
        index, _, _ = key.partition(".")
        if index not in numbers["state"]:
            raise KeyError(f"optimizer.state.{index}")
    for group in numbers["param_groups"]:
        if not all(isinstance(index, int) for index in group["params"]):
            raise TypeError("the optimizer's groups do not list parameters")
    torch.Generator().set_state(rng["trainer"])
    torch.Generator().set_state(rng["torch"])
    updates, metrics = state["ema_updates"], state["metrics"]
    if type(updates) is not int or not isinstance(metrics, str):
        raise TypeError(f"ema_updates is {updates!r}, metrics a {type(metrics).__name__}")
    return Saved(
        saved.iteration, settings, model, ema, updates, tensors["optimizer"], numbers, rng, metrics
    )


@torch.no_grad()
def _restore(trainer: Trainer, saved: Saved) -> None:
    optimizers.restore(trainer.optimizer, saved.optimizer_tensors, saved.optimizer_numbers)
    for name, p in trainer.parameters.items():
        p.copy_(saved.model[name])
        trainer.ema.average[name].copy_(saved.ema[name])
    trainer.ema.updates = saved.ema_updates
    trainer.generator.set_state(saved.rng["trainer"])
    torch.set_rng_state(saved.rng["torch"])
    if "cuda" in saved.rng and trainer.device.type == "cuda":
        torch.cuda.set_rng_state(saved.rng["cuda"], trainer.device)
    trainer.iteration = saved.iteration


def _settings(trainer: Trainer) -> dict[str, Any]:
    """What a continuation must share with its run, as JSON gives it back."""
    config = dataclasses.asdict(trainer.config)
    schedule, prompts, policy = trainer.schedule, trainer.prompts, trainer.policy
    frozen = {name: p for name, p in policy.named_parameters() if name not in trainer.parameters}
    settings = {
        "recipe": dict(trainer.recipe),
        "config": {name: value for name, value in config.items() if name not in _FREE},
        "guard": dataclasses.asdict(trainer.guard),
        "schedule": {
            "sigmas": schedule.sigmas,
            "noise_level": schedule.noise_level,
            "kind": schedule.kind,
        },
        "prompts": {
            "shape": tuple(prompts.shape),
            "dtype": str(prompts.dtype),
            "values": _fingerprint({"prompts": prompts}, prompts.nbytes),
        },
        "policy": {
            "latent_shape": tuple(policy.latent_shape),
            "frozen_parameters": _fingerprint(frozen, _SAMPLED),
        },
        "optimizer": optimizers.settings(trainer.optimizer),
    }
    result: dict[str, Any] = optimizers.plain(settings)
    return result


def _fingerprint(tensors: Mapping[str, Tensor], most: int) -> str:
    """SHA-256 of names, shapes, dtypes and, spread over each tensor, ``most`` of its bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        flat = tensor.detach().flatten().contiguous().view(torch.uint8)
        if len(flat) > most:
            flat = flat[torch.arange(most, device=flat.device) * (len(flat) - 1) // (most - 1)]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(flat.cpu().numpy().data)
    return digest.hexdigest()


def _check(trainer: Trainer, saved: Saved) -> None:
    kinds = {name: (tuple(p.shape), p.dtype) for name, p in trainer.parameters.items()}
    held = {name: (tuple(p.shape), p.dtype) for name, p in saved.model.items()}
    for name in sorted(kinds.keys() | held.keys()):
        if kinds.get(name) != held.get(name):
            raise ValueError(
                f"`policy` has {_parameter(name, kinds)} but the checkpoint "
                f"{_parameter(name, held)}; it is of another model"
            )
    for part, now in trainer.settings.items():
        then = saved.settings.get(part, {})
        names = [*now, *(name for name in then if name not in now)]
        if part == "optimizer":  # a later torch may have more hyperparameters, at their defaults
            names = [name for name in now if name in then]
        for name in names:
            if now.get(name) != then.get(name):
                raise ValueError(
                    f"`{part}.{name}` is {now.get(name)!r} but the run in `out` was trained with "
                    f"{then.get(name)!r}; resume with the same or choose another `out`"
                )


def _parameter(name: str, kinds: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> str:
    if name not in kinds:
        return f"no parameter {name!r}"
    shape, dtype = kinds[name]
    return f"parameter {name!r} of shape {shape} in {dtype}"
