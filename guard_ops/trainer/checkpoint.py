"""Checkpoints that survive a kill at any moment, and say so when they did not survive a disk.

``checkpoints/iteration-000120/`` holds one safetensors file per kind of tensors (``model``,
``ema``, ``optimizer``), ``state.json`` (everything that is not a tensor) and
``manifest.json`` (the iteration, size and SHA-256 of every other file, and its own SHA-256). It is
written under a temporary name, synced, and renamed: under its real name it is complete. Of a
sharded model each rank writes a ``shard-...safetensors`` with its part of all of them (shards.py).
Whatever is wrong with a checkpoint makes it unusable, and the one before it is used: it is set
aside as ``iteration-000120.corrupt``, never deleted or written over.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from . import shards
from .extras import require
from .folder import RunFolderError, aside, writing

VERSION = 3
_PREFIX, _TEMPORARY = "iteration-", ".writing-"
_MANIFEST, _STATE, _TENSORS = "manifest.json", "state.json", ".safetensors"

T = TypeVar("T")


class CheckpointError(RunFolderError):
    """No usable checkpoint; the message names the files and what is wrong with each."""

    _suffix = "corrupt"  # of the name under which such a checkpoint is set aside


class _OtherVersionError(CheckpointError):
    _suffix = "other-version"


class Checkpoint(NamedTuple):
    path: Path
    iteration: int
    # file name without suffix -> name -> tensor; without values ("meta") where there are shards
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]  # JSON


class Unusable(NamedTuple):
    """A checkpoint with something wrong."""

    path: Path
    reason: str  # names the file
    suffix: str


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

    Raises:
        RunFolderError: the disk is full, the folder read-only ...; or there is a checkpoint of
            this iteration, which is never written over.
    """
    safetensors = require("safetensors.torch", "train")
    temporary = begin(root, iteration)
    with saving(temporary):
        for name, group in tensors.items():
            copies = {k: value.detach().cpu().clone().contiguous() for k, value in group.items()}
            safetensors.save_file(copies, temporary / f"{name}{_TENSORS}")
    return finish(temporary, iteration, state, keep, {})


def begin(root: Path, iteration: int) -> Path:
    """The temporary folder of a checkpoint that :func:`finish` gives its name."""
    final = root / name_of(iteration)
    if final.exists():
        raise RunFolderError(
            f"{final} exists: iteration {iteration} is saved, and never written over"
        )
    temporary = root / f"{_TEMPORARY}{iteration:06d}"
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(f"{_TEMPORARY}*"):  # a run was killed while it wrote this
            _delete(leftover)
        temporary.mkdir()
    return temporary


def finish(
    temporary: Path,
    iteration: int,
    state: Mapping[str, Any],
    keep: int,
    entries: Mapping[str, dict[str, Any]],
) -> Path:
    """Complete a checkpoint whose tensors are written, of which ``entries`` are on the disk."""
    root, final = temporary.parent, temporary.parent / name_of(iteration)
    with saving(temporary):
        (temporary / _STATE).write_text(json.dumps(dict(state), indent=1) + "\n")
        (temporary / _MANIFEST).write_text(_manifest_of(temporary, iteration, entries))
        for path in (*temporary.iterdir(), temporary):
            if path.name not in entries:
                _sync(path)
        temporary.rename(final)
        _sync(root)
    with writing(root):
        _delete_checkpoints(_folders(root)[keep:])
    return final


def entry(path: Path) -> dict[str, Any]:
    """What a manifest says of a file, which is on the disk then."""
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


@contextmanager
def saving(temporary: Path) -> Iterator[None]:
    """The block writes ``temporary`` with safetensors and renames it at its end.

    What it could not write to its end is deleted: a full disk has use for the space.

    Raises:
        RunFolderError: the disk is full, the folder read-only ...
    """
    failure = require("safetensors", "train").SafetensorError
    try:
        with writing(temporary):
            yield
    except (failure, RunFolderError) as error:
        with suppress(OSError):
            _delete(temporary)
        if isinstance(error, RunFolderError):
            raise
        raise RunFolderError(
            f"cannot write {temporary}: {error}; what was saved before is whole"
        ) from error


def clear(root: Path) -> None:
    """Delete the checkpoints in ``root``, what is half written, and ``root`` if nothing is left.

    Checkpoints that were set aside and files of others stay, as does what cannot be deleted.
    """
    with suppress(OSError):
        _delete_checkpoints(_folders(root))
        for leftover in root.glob(f"{_TEMPORARY}*"):
            _delete(leftover)
        root.rmdir()


def newest(root: Path, understand: Callable[[Checkpoint], T]) -> tuple[T | None, list[Unusable]]:
    """The newest checkpoint in ``root`` that can be used, and those newer that cannot.

    Reads only: what is to be done with the unusable ones is the caller's (:func:`set_aside`).

    Args:
        understand: makes of a checkpoint what the caller uses. What it raises because something
            is not there or of another type makes that checkpoint unusable.
    """
    return _newest(root, lambda path: understand(load(path)))


def newest_state(
    root: Path, understand: Callable[[dict[str, Any]], T]
) -> tuple[T | None, list[Unusable]]:
    """As :func:`newest`, of the ``state.json`` alone: no tensor is read, or checked."""
    return _newest(root, lambda path: understand(_load_state(path)))


def _newest(root: Path, understand: Callable[[Path], T]) -> tuple[T | None, list[Unusable]]:
    unusable: list[Unusable] = []
    for path in _folders(root):
        try:
            return understand(path), unusable
        except CheckpointError as error:
            unusable.append(Unusable(path, str(error), error._suffix))
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = f"{path} does not hold the state of a run: {type(error).__name__}: {error}"
            unusable.append(Unusable(path, reason, CheckpointError._suffix))
    return None, unusable


def set_aside(unusable: Sequence[Unusable], instead: str) -> None:
    """Rename checkpoints which :func:`newest` could not use, with a RuntimeWarning for each.

    Args:
        instead: the warnings' last words, "using the previous checkpoint".
    """
    for path, reason, suffix in unusable:
        kept = aside(path, suffix)
        with writing(path):
            path.rename(kept)
        warnings.warn(
            f"guard_ops: {reason}; kept as {kept.name}, {instead}",
            RuntimeWarning,
            stacklevel=4,
        )


def load(path: Path, *, check: bool = True) -> Checkpoint:
    """The checkpoint in the folder ``path``, every byte checked.

    Args:
        check: False if another rank has done that.

    Raises:
        CheckpointError: the message names the file and the reason.
    """
    with _reading(path):
        iteration, files = _read_manifest(path)
        if check:
            _check_files(path, files)
        if any(shards.is_shard(name) for name in files):
            tensors = shards.described(path)
        else:
            tensors = {
                name.removesuffix(_TENSORS): _read_tensors(path / name)
                for name in files
                if name != _STATE
            }
        return Checkpoint(path, iteration, tensors, _read_json(path / _STATE))


def _load_state(path: Path) -> dict[str, Any]:
    """``state.json`` of the checkpoint in the folder ``path``; raises as :func:`load` does."""
    with _reading(path):
        _, files = _read_manifest(path)
        _check_file(path / _STATE, *files[_STATE])
        return _read_json(path / _STATE)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """The block reads the checkpoint in the folder ``path``; what stops it is a CheckpointError."""
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise CheckpointError(f"{path} is not a folder")
        yield
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path} cannot be read: {error.strerror or error}"
        ) from error
    except RecursionError as error:
        raise CheckpointError(f"{path / _MANIFEST} is corrupt: {error}") from error


def name_of(iteration: int) -> str:
    """The name of a checkpoint's folder."""
    return f"{_PREFIX}{iteration:06d}"


def exist(root: Path) -> bool:
    """Whether ``root`` holds any checkpoint, intact or not."""
    return bool(_folders(root))


def _folders(root: Path) -> list[Path]:
    """The checkpoints under their real names, newest first."""
    name = re.compile(rf"{_PREFIX}([0-9]+)")
    found = [(int(m[1]), p) for p in root.glob(f"{_PREFIX}*") if (m := name.fullmatch(p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _manifest_of(folder: Path, iteration: int, entries: Mapping[str, dict[str, Any]]) -> str:
    """The text of ``manifest.json`` for the files in ``folder``."""
    manifest = {
        "version": VERSION,
        "iteration": iteration,
        "files": {
            path.name: entries.get(path.name) or entry(path) for path in sorted(folder.iterdir())
        },
    }
    return json.dumps(manifest | {"sha256": _digest(manifest)}, indent=1) + "\n"


def _read_manifest(folder: Path) -> tuple[int, dict[str, tuple[int, str]]]:
    """The iteration, and size and SHA-256 of each file."""
    path = folder / _MANIFEST
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        raise CheckpointError(f"{path} is not a file")
    manifest = _read_json(path)
    written = manifest.pop("sha256", None)
    if written is not None and written != _digest(manifest):
        raise CheckpointError(f"{path} is corrupt: its own SHA-256 is not what it was written with")
    if manifest.get("version") != VERSION:
        raise _OtherVersionError(
            f"{path} has format version {manifest.get('version')!r}; this guard_ops reads {VERSION}"
        )
    if written is None:
        raise CheckpointError(f"{path} is corrupt: it has no SHA-256 of its own")
    iteration, entries = manifest.get("iteration"), manifest.get("files")
    if type(iteration) is not int or folder.name != f"{_PREFIX}{iteration:06d}":
        raise CheckpointError(f"{path} is of iteration {iteration!r}, not of {folder.name}")
    if not isinstance(entries, dict) or _STATE not in entries:
        raise CheckpointError(f"{path} is corrupt: it does not list {_STATE}")
    files = {}
    for name, entry in entries.items():
        plain = name == _STATE or re.fullmatch(rf"[\w-]+{re.escape(_TENSORS)}", name)
        match entry:
            case {"bytes": int(size), "sha256": str(digest)} if plain:
                files[name] = size, digest
            case _:
                raise CheckpointError(f"{path} is corrupt: it lists {name!r} as {entry!r}")
    return iteration, files


def _check_files(folder: Path, files: Mapping[str, tuple[int, str]]) -> None:
    """That there are exactly these files, with these contents."""
    there = {path.name for path in folder.iterdir()} - {_MANIFEST}
    for name in sorted(there - files.keys()):
        raise CheckpointError(f"{folder / name} is not of this checkpoint: its manifest lacks it")
    for name, entry in files.items():
        _check_file(folder / name, *entry)


def _check_file(file: Path, size: int, digest: str) -> None:
    """That a file has this size and SHA-256."""
    if not os.path.lexists(file):
        raise CheckpointError(f"{file} is missing")
    found = file.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{file} is not a file")
    if found.st_size < size:
        raise CheckpointError(f"{file} is truncated: {found.st_size} bytes of {size}")
    if found.st_size > size:
        raise CheckpointError(f"{file} is corrupt: {found.st_size} bytes, written as {size}")
    if _sha256(file) != digest:
        raise CheckpointError(f"{file} is corrupt: its SHA-256 is not the one it was written with")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    failure = require("safetensors", "train").SafetensorError
    try:
        tensors: dict[str, Tensor] = require("safetensors.torch", "train").load_file(path)
    except (failure, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is corrupt: {error}") from error
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (RecursionError, ValueError) as error:  # too deep; not JSON; not UTF-8
        raise CheckpointError(f"{path} is corrupt: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is corrupt: it holds no JSON object")
    return value


def _digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a manifest without its own SHA-256."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _delete_checkpoints(folders: Sequence[Path]) -> None:
    for path in folders:
        # It is renamed first, so that a checkpoint is never half deleted under its own name.
        _delete(path.rename(path.with_name(f"{_TEMPORARY}deleting-{path.name}")))


def _delete(path: Path) -> None:
    """Delete a folder, or the file or link that stands in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync(path: Path) -> None:
    """Wait until a file's or a folder's contents are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
