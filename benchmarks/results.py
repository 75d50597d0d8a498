"""Saves measured numbers in ``results/<machine>.json``, with a section for each table."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .accuracy import Accuracy

FOLDER = Path(__file__).parent / "results"

Row = dict[str, Any]


Machine = dict[str, dict[str, Any]]  # section -> environment and rows


def machine_label(device: str = "cpu") -> str:
    """A name for this kind of machine, such as ``cpu-2core``; never the host's."""
    if device != "cpu":
        return torch.cuda.get_device_name(0).lower().replace(" ", "-").replace("/", "-")
    return f"cpu-{os.cpu_count()}core"


def section(rows: list[Row], device: str = "cpu") -> dict[str, Any]:
    """Rows and the environment they were measured in, as every file keeps them."""
    from .measure import environment  # here, because it needs a guard_ops that works

    name = "cpu" if device == "cpu" else torch.cuda.get_device_name(0)
    return {"environment": {"device": name, **environment()}, "rows": rows}


def save(name: str, rows: list[Row], folder: Path = FOLDER, device: str = "cpu") -> Path:
    """Write a section's rows and the environment they were measured in; other sections stay."""
    return put(name, section(rows, device), folder, device)


def put(
    name: str,
    found: dict[str, Any],
    folder: Path = FOLDER,
    device: str = "cpu",
    copy_to: Path | None = None,  # a folder that gets the whole file as well
) -> Path:
    """Write a section into the machine's file; its other sections stay."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{machine_label(device)}.json"
    machine = json.loads(path.read_text()) if path.exists() else {}
    for place in (path, *([copy_to / path.name] if copy_to else [])):
        place.parent.mkdir(parents=True, exist_ok=True)
        write(place, machine | {name: found})
    return path


def known(name: str, folder: Path = FOLDER, device: str = "cpu") -> dict[str, Any]:
    """A section of the machine's file; empty without one, or if the file cannot be read."""
    try:
        machine = json.loads((folder / f"{machine_label(device)}.json").read_text())
        found = machine.get(name, {})
    except (OSError, ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def sources() -> str:
    """A hash of what is measured: the package and its kernels, in Python and C++.

    Numbers of two runs belong together where it is the same.
    """
    root = FOLDER.parents[1]
    digest = hashlib.sha256()
    for top in ("guard_ops", "csrc"):
        for path in sorted((root / top).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp", ".cu"):
                digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def write(path: Path, machine: Machine) -> None:
    """Write a file for :func:`load`, ``--compare`` and the plots; on failure it is as it was."""
    written = path.with_name(path.name + ".written")
    written.write_text(json.dumps(machine, indent=1) + "\n")
    os.replace(written, path)


def load(folder: Path = FOLDER) -> dict[str, Machine]:
    """Machine label -> section -> environment and rows, of every saved file."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def accuracy_row(found: Accuracy) -> Row:
    """A measured accuracy with three significant digits."""
    rounded = {n: float(f"{getattr(found, n):.3g}") for n in ("log_ratio_error", "max_error")}
    return {**dataclasses.asdict(found), **rounded}
