"""The digits policy before any reward: trained by flow matching, and kept in a file.

``pretrained.safetensors`` is the result; ``pretraining/`` beside it holds checkpoints of one that
is under way, so that what was interrupted continues, to the same bits.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..trainer import checkpoint, optimizers
from ..trainer.checkpoint import Checkpoint
from ..trainer.extras import require
from ..trainer.folder import writing
from .policy import DigitPolicy, flow_matching_loss, load_digits

BATCH = 256
CHECKPOINTS = 10  # of one pretraining


def pretrain(
    seed: int,
    steps: int = 3000,
    batch: int = BATCH,
    tick: Callable[[int], object] | None = None,
    checkpoints: Path | None = None,
) -> DigitPolicy:
    """A policy trained by flow matching: AdamW, learning rate 1e-3 to 1e-5 on a cosine.

    Args:
        seed: of the initial weights and of the batches.
        tick: called after every step with the number of steps done.
        checkpoints: a folder to save checkpoints in, and to continue from.

    Raises:
        ValueError: the checkpoints are of a pretraining with other settings.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = DigitPolicy()
    digits = load_digits()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1), eta_min=1e-5)
    settings, done = _settings(seed, steps, batch), 0
    if checkpoints is not None:
        saved, unusable = checkpoint.newest(checkpoints, _understand)
        if saved is not None:
            _check(saved.state["made_with"], settings, checkpoints)
            policy.load_state_dict(saved.tensors["model"])
            optimizers.restore(optimizer, saved.tensors["optimizer"], saved.state["optimizer"])
            schedule.load_state_dict(saved.state["schedule"])
            generator.set_state(saved.tensors["rng"]["batches"])
            done = saved.iteration
        checkpoint.set_aside(unusable, "using the previous checkpoint" if done else "starting over")
    for step in range(done, steps):
        loss = flow_matching_loss(policy, digits, batch, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if checkpoints is not None and (step + 1) % -(-steps // CHECKPOINTS) == 0:
            tensors = {
                "model": policy.state_dict(),
                "optimizer": optimizers.tensors(optimizer),
                "rng": {"batches": generator.get_state()},
            }
            numbers = {
                "made_with": settings,
                "optimizer": optimizers.numbers(optimizer),
                "schedule": optimizers.plain(schedule.state_dict()),
            }
            checkpoint.save(checkpoints, step + 1, tensors, numbers, keep=2)
        if tick is not None:
            tick(step + 1)
    return policy


def load_or_pretrain(
    path: Path, seed: int, steps: int, tick: Callable[[int], object] | None = None
) -> DigitPolicy:
    """:func:`pretrain`, kept in the safetensors file ``path`` and read from there next time.

    A file that is damaged, or was written without a SHA-256, is set aside as
    ``pretrained.safetensors.corrupt`` or ``.other-version`` and made again, with a RuntimeWarning.

    Raises:
        ValueError: the file, or a pretraining under way, is of other settings; it is left alone.
    """
    checkpoints, settings = path.with_name("pretraining"), _settings(seed, steps, BATCH)
    found = _read(path, settings) if os.path.lexists(path) else None
    if found is None:
        policy = pretrain(seed, steps, tick=tick, checkpoints=checkpoints)
        _write(path, policy.state_dict(), settings)
    else:
        policy = DigitPolicy()
        policy.load_state_dict(found)
    # The file is whole by now. A process killed before this line leaves the folder to the next
    # call.
    checkpoint.clear(checkpoints)
    return policy


def _settings(seed: int, steps: int, batch: int) -> dict[str, str]:
    numbers = {"seed": seed, "pretrain_steps": steps, "batch": batch}
    return {name: str(x) for name, x in numbers.items()} | {"torch": torch.__version__}


def _check(then: Mapping[str, str], now: Mapping[str, str], path: Path) -> None:
    for name, value in now.items():
        if then.get(name) != value:
            raise ValueError(
                f"`{name}` is {value} but {path} was made with {then.get(name)}; continue with the "
                "same or choose another `out`"
            )


def _understand(saved: Checkpoint) -> Checkpoint:
    """``saved``, if it is one of a pretraining."""
    for name in ("model", "optimizer", "rng"):
        saved.tensors[name].keys()
    for name in ("made_with", "optimizer", "schedule"):
        saved.state[name].keys()
    return saved


def _read(path: Path, settings: Mapping[str, str]) -> dict[str, Tensor] | None:
    """The weights in the file; None if they cannot be used, and it is set aside."""
    safetensors = require("safetensors", "train")
    try:
        with safetensors.safe_open(path, "pt") as file:
            then = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        unusable = checkpoint.Unusable(path, f"{path} is damaged ({error})", "corrupt")
    else:
        if then.get("sha256") == _digest(weights, then):
            _check(then, settings, path)
            return weights
        if "sha256" in then:
            reason = f"{path} is damaged (its SHA-256 is not the one it was written with)"
            unusable = checkpoint.Unusable(path, reason, "corrupt")
        else:
            reason = f"{path} cannot be checked: it has no SHA-256"
            unusable = checkpoint.Unusable(path, reason, "other-version")
    checkpoint.set_aside([unusable], "pretraining again")
    return None


def _write(path: Path, weights: Mapping[str, Tensor], settings: Mapping[str, str]) -> None:
    save_file = require("safetensors.torch", "train").save_file
    temporary = path.with_suffix(".writing")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with checkpoint.saving(temporary):
        save_file(weights, temporary, {**settings, "sha256": _digest(weights, settings)})
        temporary.replace(path)  # complete or not there, whenever the process is killed


def _digest(weights: Mapping[str, Tensor], settings: Mapping[str, str]) -> str:
    """SHA-256 of settings and weights."""
    digest = hashlib.sha256()
    for name in sorted(settings.keys() - {"sha256"}):
        digest.update(f"{name}={settings[name]}\n".encode())
    for name in sorted(weights):
        tensor = weights[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
