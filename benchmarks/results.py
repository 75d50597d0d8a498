"""Where measured numbers live: ``results/<machine>.json``, one section per table."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .measure import environment

FOLDER = Path(__file__).parent / "results"

Row = dict[str, Any]


def machine_label() -> str:
    """A name for this kind of machine, such as ``cpu-2core``; never the host's."""
    return f"cpu-{os.cpu_count()}core"


def save(section: str, rows: list[Row], folder: Path = FOLDER) -> Path:
    """Write a section's rows and the environment they were measured in; other sections stay."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{machine_label()}.json"
    machine = json.loads(path.read_text()) if path.exists() else {}
    machine[section] = {"environment": environment(), "rows": rows}
    path.write_text(json.dumps(machine, indent=2, sort_keys=True) + "\n")
    return path


def load(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """Machine label -> section -> environment and rows, of every saved file."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
