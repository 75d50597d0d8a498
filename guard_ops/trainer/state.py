"""What a run's checkpoints hold, and what a continuation must share with its run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import guard_ops as go

from . import checkpoint, optimizers, shards
from .checkpoint import Checkpoint, CheckpointError
from .config import TrainConfig
from .engine import Engine, fill, sharded
from .learner import Learner
from .policy import FlowPolicy

# These settings may differ between a run and its continuation.
_FREE = (
    "iterations", "evaluate_every", "checkpoint_every", "keep_checkpoints", "tensorboard",
    "micro_batch", "rollout_batch", "reward_retries", "reward_timeout", "reward_overlap",
)  # fmt: skip
_SAMPLED = 1024  # bytes of each frozen parameter that tell it from another


class Saved(NamedTuple):
    """A checkpoint of a trainer, each part of its type."""

    path: Path
    iteration: int
    settings: dict[str, dict[str, Any]]
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    ema_updates: int
    optimizer_tensors: dict[str, Tensor]
    optimizer_numbers: dict[str, Any]
    metrics: str  # the text of metrics.jsonl


def find(
    root: Path, resume: bool, engine: Engine
) -> tuple[Saved | None, list[checkpoint.Unusable]]:
    """The checkpoint to continue from, the same on every rank; None to begin.

    Newer ones that cannot be used are rank 0's to set aside.

    Raises:
        ValueError: there are checkpoints, and ``resume`` is False.
        CheckpointError: none can be used; no file is touched then.
    """
    name, unusable = engine.first(lambda: _choose(root, resume))
    saved = None if name is None else _understand(checkpoint.load(root / name, check=False))
    return saved, unusable if engine.rank == 0 else []


def refuse_checkpoints(root: Path) -> None:
    """Raises a ValueError where there are checkpoints: a run that begins has none."""
    if checkpoint.exist(root):
        raise ValueError(
            f"`out` is {str(root.parent)!r}, which has checkpoints of another run; continue it "
            "with `resume=True` or choose another folder"
        )


def _choose(root: Path, resume: bool) -> tuple[str | None, list[checkpoint.Unusable]]:
    if not resume:
        refuse_checkpoints(root)
        return None, []
    found, unusable = checkpoint.newest(root, _understand)
    _refuse_if_none_is_intact(found, unusable)
    return None if found is None else checkpoint.name_of(found.iteration), unusable


def _refuse_if_none_is_intact(found: object, unusable: Sequence[checkpoint.Unusable]) -> None:
    if found is None and unusable:
        reasons = "; ".join(one.reason for one in unusable)
        raise CheckpointError(f"no intact checkpoint to resume from: {reasons}")


def refuse_another_run(root: Path, resume: bool, chosen: Mapping[str, Any]) -> None:
    """What a :class:`Trainer` would refuse of a folder that can be known without a model.

    No tensor is read: of damaged checkpoints, those are found whose settings are.

    Args:
        chosen: of :func:`chosen`.

    Raises:
        ValueError: there are checkpoints and ``resume`` is False, or they are of other settings.
        CheckpointError: there are checkpoints, and the settings of none can be read.
    """
    if not resume:
        refuse_checkpoints(root)
        return
    then, unusable = checkpoint.newest_state(root, _settings)
    _refuse_if_none_is_intact(then, unusable)
    if then is not None:
        _compare(then, chosen)


def save(
    root: Path,
    learner: Learner,
    settings: Mapping[str, Any],
    metrics: str,
    keep: int,
    engine: Engine,
) -> Path:
    """Write a checkpoint; returns its folder."""
    tensors = {
        "model": learner.ema.weights(),
        "ema": learner.ema.average,
        "optimizer": optimizers.tensors(learner.optimizer),
    }
    rest = {
        "settings": settings,
        "ema_updates": learner.ema.updates,
        "optimizer": optimizers.numbers(learner.optimizer),
        "metrics": metrics,
    }
    iteration = learner.iteration
    if not sharded(tensors["model"]):
        return engine.first(lambda: checkpoint.save(root, iteration, tensors, rest, keep))
    temporary = engine.first(lambda: checkpoint.begin(root, iteration))
    entries: dict[str, dict[str, Any]] = {}
    with engine.together(), checkpoint.saving(temporary):
        shards.write(temporary, tensors, engine.group is None)
        for path in temporary.glob(f"shard-{engine.rank + 1:05d}-*"):
            entries[path.name] = checkpoint.entry(path)
    every = {name: entry for part in engine.gather(entries) for name, entry in part.items()}
    return engine.first(lambda: checkpoint.finish(temporary, iteration, rest, keep, every))


def _settings(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of a run in its ``state.json``, by their parts."""
    settings: dict[str, dict[str, Any]] = state["settings"]
    if not all(isinstance(part, dict) for part in settings.values()):
        raise TypeError("its settings are not in parts")
    return settings


def _understand(saved: Checkpoint) -> Saved:
    """A checkpoint's parts; raises where one is not there or not of its type."""
    state, tensors = saved.state, saved.tensors
    model, ema = tensors["model"], tensors["ema"]
    settings, numbers = _settings(state), state["optimizer"]
    if {k: v.shape for k, v in model.items()} != {k: v.shape for k, v in ema.items()}:
        raise ValueError("the weights and their average are of different models")
    for key in tensors["optimizer"]:
        index, _, _ = key.partition(".")
        if index not in numbers["state"]:
            raise KeyError(f"optimizer.state.{index}")
    for group in numbers["param_groups"]:
        if not all(isinstance(index, int) for index in group["params"]):
            raise TypeError("the optimizer's groups do not list parameters")
    updates, metrics = state["ema_updates"], state["metrics"]
    if type(updates) is not int or not isinstance(metrics, str):
        raise TypeError(f"ema_updates is {updates!r}, metrics a {type(metrics).__name__}")
    return Saved(
        saved.path,
        saved.iteration,
        settings,
        model,
        ema,
        updates,
        tensors["optimizer"],
        numbers,
        metrics,
    )


@torch.no_grad()
def restore(learner: Learner, saved: Saved, engine: Engine) -> None:
    """Put a checkpoint into the weights, their average and the optimizer, sharded or not."""
    state = optimizers.like(saved.optimizer_tensors, learner.optimizer)
    mine: dict[str, Mapping[str, Tensor]]
    mine = {"model": learner.parameters, "ema": learner.ema.average, "optimizer": state}
    if any(value.is_meta for value in saved.model.values()):
        shards.read(saved.path, mine, engine.group is None)
    else:
        kinds = {"model": saved.model, "ema": saved.ema, "optimizer": saved.optimizer_tensors}
        for kind, group in mine.items():
            for name, value in group.items():
                fill(value, kinds[kind][name])
    optimizers.restore(learner.optimizer, state, saved.optimizer_numbers)
    learner.ema.updates, learner.iteration = saved.ema_updates, saved.iteration


def chosen(
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    guard: go.GuardConfig,
    config: TrainConfig,
    recipe: Mapping[str, Any],
) -> dict[str, Any]:
    """What a continuation must share with its run that is known without a model, as JSON has it."""
    texts = json.dumps([list(prompts), [dict(each) for each in metadata]], sort_keys=True)
    held = {k: v for k, v in dataclasses.asdict(config).items() if k not in _FREE}
    parts = {
        "recipe": dict(recipe),
        "config": held,
        "guard": dataclasses.asdict(guard),
        "prompts": {
            "count": len(prompts),
            "values": hashlib.sha256(texts.encode()).hexdigest(),
        },
    }
    result: dict[str, Any] = optimizers.plain(parts)
    return result


def settings(
    policy: FlowPolicy,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    chosen: Mapping[str, Any],
) -> dict[str, Any]:
    """All that a continuation must share with its run: :func:`chosen`, and what the model says."""
    frozen = {name: p for name, p in policy.named_parameters() if not p.requires_grad}
    sigmas, timesteps = policy.schedule(config.steps)
    parts = {
        "schedule": {"sigmas": list(sigmas), "timesteps": timesteps.tolist()},
        "policy": {
            "latent_shape": tuple(policy.latent_shape),
            "frozen_parameters": _fingerprint(frozen, _SAMPLED),
        },
        "optimizer": optimizers.settings(optimizer),
    }
    return {**chosen, **optimizers.plain(parts)}


def _fingerprint(tensors: Mapping[str, Tensor], most: int) -> str:
    """SHA-256 of names, shapes, dtypes and, spread over each tensor, ``most`` of its bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if tensor.is_meta:  # not read yet
            continue
        flat = tensor.detach().flatten().contiguous().view(torch.uint8)
        if len(flat) > most:
            flat = flat[torch.arange(most, device=flat.device) * (len(flat) - 1) // (most - 1)]
        digest.update(flat.cpu().numpy().data)
    return digest.hexdigest()


def check(saved: Saved, settings: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
    """Raises a ValueError where the run in a checkpoint is another one than this."""
    kinds = {name: (tuple(p.shape), p.dtype) for name, p in parameters.items()}
    held = {name: (tuple(p.shape), p.dtype) for name, p in saved.model.items()}
    for name in sorted(kinds.keys() | held.keys()):
        if kinds.get(name) != held.get(name):
            raise ValueError(
                f"`policy` has {_parameter(name, kinds)} but the checkpoint "
                f"{_parameter(name, held)}; it is of another model"
            )
    _compare(saved.settings, settings)


def _compare(held: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    """Raises a ValueError that names the first setting of a run that is another one now."""
    for part, now in settings.items():
        then = held.get(part, {})
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
