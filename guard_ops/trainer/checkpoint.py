"""Checkpoints that survive a kill at any moment, and say so when they did not survive a disk.

``checkpoints/iteration-000120/`` holds one safetensors file per kind of tensors (``model``,
``ema``, ``optimizer``, ``rng``), ``state.json`` (everything that is not a tensor) and
``manifest.json`` (size and SHA-256 of the other files). It is written under a temporary name,
synced, and renamed: under its real name it is complete. A checkpoint that does not match its
manifest is set aside as ``iteration-000120.corrupt``, never deleted or written over.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .extras import require

VERSION = 1
_PREFIX, _TEMPORARY = "iteration-", ".writing-"


class CheckpointError(RuntimeError):
    """No usable checkpoint; the message names the files and what is wrong with each."""


class _CorruptError(CheckpointError):
    """The checkpoint is corrupt and can be set aside; one of another format version cannot."""


class Checkpoint(NamedTuple):
    iteration: int
    tensors: dict[str, dict[str, Tensor]]  # file name without suffix -> name -> tensor
    state: dict[str, Any]  # JSON


def save(
    root: Path,
    iteration: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint into the folder ``root`` and delete all but its ``keep`` newest.

    Args: the fields of :class:`Checkpoint`; tensors may be on any device and share memory.

    Returns:
        The checkpoint's folder.
    """
    safetensors = require("safetensors.torch", "train")
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(f"{_TEMPORARY}*"):  # a run was killed while it wrote this
        shutil.rmtree(leftover)
    temporary = root / f"{_TEMPORARY}{iteration:06d}"
    temporary.mkdir()
    for name, group in tensors.items():
        copies = {key: value.detach().cpu().clone().contiguous() for key, value in group.items()}
        safetensors.save_file(copies, temporary / f"{name}.safetensors")
    _write_json(temporary / "state.json", dict(state))
    manifest = {
        "version": VERSION,
        "iteration": iteration,
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(temporary.iterdir())
        },
    }
    _write_json(temporary / "manifest.json", manifest)
    for path in (*temporary.iterdir(), temporary):
        _sync(path)
    final = root / f"{_PREFIX}{iteration:06d}"
    temporary.rename(final)
    _sync(root)
    for path in _folders(root)[keep:]:
        # renamed first, so that a checkpoint is never half deleted under its own name
        shutil.rmtree(path.rename(root / f"{_TEMPORARY}deleting-{path.name}"))
    return final


def load_latest(root: Path) -> Checkpoint | None:
    """The newest intact checkpoint in ``root``; None if there is none at all.

    Corrupt ones that are newer are set aside with a RuntimeWarning naming file and reason.

    Raises:
        CheckpointError: there are checkpoints and every one is corrupt; nothing is touched.
    """
    corrupt: list[tuple[Path, str]] = []
    found = None
    for path in _folders(root):
        try:
            found = load(path)
            break
        except _CorruptError as error:
            corrupt.append((path, str(error)))
    if corrupt and found is None:
        raise CheckpointError(
            "no intact checkpoint to resume from: " + "; ".join(reason for _, reason in corrupt)
        )
    for path, reason in corrupt:
        aside = _set_aside(path)
        warnings.warn(
            f"guard_ops: {reason}; kept as {aside.name}, using the previous checkpoint",
            RuntimeWarning,
            stacklevel=3,
        )
    return found


def load(path: Path) -> Checkpoint:
    """The checkpoint in the folder ``path``, every byte checked.

    Raises:
        CheckpointError: the message names the file and the reason.
    """
    manifest = _read_json(path / "manifest.json")
    try:
        version, iteration, files = (manifest[x] for x in ("version", "iteration", "files"))
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise _CorruptError(f"{path / 'manifest.json'} is corrupt: {error!r}") from error
    if version != VERSION:
        raise CheckpointError(
            f"{path / 'manifest.json'} has format version {version!r}; this guard_ops reads "
            f"{VERSION}"
        )
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file():
            raise _CorruptError(f"{file} is missing")
        if file.stat().st_size != size:
            raise _CorruptError(
                f"{file} is truncated: {file.stat().st_size} bytes of {size}"
                if file.stat().st_size < size
                else f"{file} is corrupt: {file.stat().st_size} bytes, written as {size}"
            )
        if _sha256(file) != digest:
            raise _CorruptError(
                f"{file} is corrupt: its SHA-256 is not the one it was written with"
            )
    load_file = require("safetensors.torch", "train").load_file
    tensors = {
        Path(name).stem: load_file(path / name)
        for name in expected
        if name.endswith(".safetensors")
    }
    return Checkpoint(iteration, tensors, _read_json(path / "state.json"))


def exist(root: Path) -> bool:
    """Whether ``root`` holds any checkpoint, intact or not."""
    return bool(_folders(root))


def _folders(root: Path) -> list[Path]:
    """The checkpoints under their real names, newest first."""
    found = [p for p in root.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(_PREFIX)), reverse=True)


def _set_aside(path: Path) -> Path:
    aside, n = path.with_name(f"{path.name}.corrupt"), 1
    while aside.exists():
        n += 1
        aside = path.with_name(f"{path.name}.corrupt-{n}")
    return path.rename(aside)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise _CorruptError(f"{path} is missing") from error
    except ValueError as error:  # not JSON, not UTF-8
        raise _CorruptError(f"{path} is corrupt: {error}") from error
    return value


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file's or a folder's contents are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
