"""What a run's folder holds for its report."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..monitor.monitor import read_monitor
from ..monitor.rule import Reading, Verdict, verdict
from ..trainer.metrics import read_metrics

_OWN = ("seed", "out", "resume", "iterations")  # in which runs of one setting may differ


class Run(NamedTuple):
    """A run as far as it has come."""

    path: Path
    lines: list[dict[str, Any]]  # of the metrics, rising in iteration
    readings: list[Reading]
    pictures: dict[int, Path]  # by iteration
    ratios: dict[int, Path]
    settings: str  # as a recipe, or as JSON where there is none
    values: dict[str, Any]  # of the settings, as far as they are flat
    command: str  # which makes the run again

    @property
    def name(self) -> str:
        return self.path.name or str(self.path)

    @property
    def verdict(self) -> Verdict | None:
        return verdict(self.readings) if self.readings else None

    @property
    def setting(self) -> str:
        """The same for runs that differ in their seeds alone."""
        return json.dumps({k: v for k, v in self.values.items() if k not in _OWN}, sort_keys=True)


class Group(NamedTuple):
    """Runs of one setting, whose seeds differ."""

    label: str
    runs: list[Run]


def read_run(path: Path) -> Run:
    """The run in a folder.

    Raises:
        ValueError: it has no readable metrics.
    """
    file = path / "metrics.jsonl"
    try:
        lines = read_metrics(file)
        iterations = [line["iteration"] for line in lines]
    except FileNotFoundError as error:
        raise ValueError(f"`run` is {str(path)!r}, which has no metrics.jsonl") from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not lines:
        raise ValueError(f"{file} is empty; the run has finished no iteration yet")
    try:
        readings = [r for r in read_monitor(path) if r.iteration <= iterations[-1]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path / 'monitor.jsonl'} cannot be read: {error}") from error
    settings, values = _settings(path)
    return Run(
        path,
        lines,
        readings,
        _numbered(path / "pictures", ("png", "gif")),
        _numbered(path / "ratios", ("safetensors",)),
        settings,
        values,
        _command(path, settings),
    )


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """The runs by setting; a group of one is named after its run, another after what is its own."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.setting if run.values else str(run.path), []).append(run)
    every = [group[0].values for group in found.values()]
    keys = [
        key
        for key in every[0]
        if key not in _OWN and len({json.dumps(v.get(key)) for v in every}) > 1
    ]
    result, taken = [], set[str]()
    for group in found.values():
        own = ", ".join(f"{key} {group[0].values.get(key)}" for key in keys[:3])
        label = group[0].name if len(group) == 1 else own or f"{len(group)} seeds"
        while label in taken:
            label = f"{label} ({group[0].path})"
        taken.add(label)
        result.append(Group(label, group))
    return result


def _numbered(folder: Path, kinds: Sequence[str]) -> dict[int, Path]:
    found = {}
    for path in sorted(folder.glob("iteration-*")) if folder.is_dir() else ():
        match = re.fullmatch(r"iteration-(\d+)\.(\w+)", path.name)
        if match and match[2] in kinds:
            found[int(match[1])] = path
    return found


def _settings(path: Path) -> tuple[str, dict[str, Any]]:
    """The recipe, or what the newest checkpoint says."""
    recipe = path / "recipe.yaml"
    if recipe.is_file():
        text = recipe.read_text()
        pairs = (line.partition(": ") for line in text.splitlines() if re.match(r"\w+: \S", line))
        return text, {key: value for key, _, value in pairs}
    states = sorted((path / "checkpoints").glob("iteration-*/state.json"))
    for state in reversed(states):
        try:
            kept = json.loads(state.read_text())["settings"]
            flat = {**kept.get("config", {}), **kept.get("guard", {}), **kept.get("recipe", {})}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
        return json.dumps(kept, indent=1), {k: v for k, v in flat.items() if k not in ("prompts",)}
    return "", {}


def _command(path: Path, settings: str) -> str:
    if (path / "recipe.yaml").is_file():
        return f"guard-ops train {path / 'recipe.yaml'} out={path}-again"
    return ""
