"""The monitor of a run: its readings, kept beside the metrics, and what they say."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..trainer.extras import require
from ..trainer.folder import write_whole
from .distances import Change, Reference
from .rule import Reading, Verdict, verdict

FILE, START = "monitor.jsonl", "monitor-start.safetensors"


class Monitor:
    """Reads gold at intervals.

    ``monitor.jsonl`` in ``out`` has a line a reading: its iteration, proxy, the gold of every
    sample, and what :class:`~guard_ops.monitor.Change` has, for which the first reading's features
    are in ``monitor-start.safetensors``. A run that is continued goes on after the readings up to
    its iteration. Of several ranks the first has the monitor.

    Args:
        out: the run's folder.
        iteration: which the run is at.
    """

    def __init__(self, out: Path, iteration: int = 0) -> None:
        self.out, self._path = out, out / FILE
        self.readings: list[Reading] = []
        self._lines: list[dict[str, Any]] = []
        self._reference: Reference | None = None
        if iteration and self._path.exists():
            self._read(self._path, iteration)

    def _read(self, path: Path, iteration: int) -> None:
        try:
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            lines = [line for line in lines if line["iteration"] <= iteration]
            self.readings = [
                Reading(line["iteration"], line["proxy"], line["gold"], line.get("diversity"))
                for line in lines
            ]
            if self.readings:
                verdict(self.readings)
            if lines and "frechet" in lines[0]:
                start = require("safetensors.torch", "train").load_file(self.out / START)
                self._reference = Reference.of(start["features"])
            self._lines = lines
        except (OSError, LookupError, TypeError, ValueError) as error:
            self.readings, self._lines, self._reference = [], [], None
            warnings.warn(
                f"guard_ops: {path} cannot be read ({error}); the monitor begins again",
                RuntimeWarning,
                stacklevel=4,
            )

    def add(
        self,
        iteration: int,
        proxy: Tensor,  # [n]
        gold: Tensor,  # [n]
        features: Tensor | None = None,  # [n, D]
        prompts: Sequence[str] | None = None,
        logits: Tensor | None = None,  # [n, C]
    ) -> dict[str, float]:
        """A reading; returns its numbers for the metrics.

        ``gap`` is by how much the proxy has risen since the first reading more than gold, each in
        units of its samples' standard deviation then.
        """
        line: dict[str, Any] = {"iteration": iteration, "proxy": float(proxy.double().mean())}
        line["proxy_std"], line["gold"] = float(proxy.double().std()), gold.double().tolist()
        numbers = {"held_out_proxy": line["proxy"], "gold": float(gold.double().mean())}
        if features is not None:
            if self._reference is None:
                self._reference = Reference.of(features.cpu())
                save = require("safetensors.torch", "train").save
                write_whole(self.out / START, save({"features": features.cpu().contiguous()}))
            names = prompts if prompts is not None else [""] * len(features)
            change = Change.of(features.cpu(), names, self._reference, logits)
            line |= {name: x for name, x in change._asdict().items() if x is not None}
            numbers |= {name: line[name] for name in change._fields if name in line}
        self.readings = [x for x in self.readings if x.iteration < iteration]
        self._lines = [x for x in self._lines if x["iteration"] < iteration]
        self.readings.append(Reading(iteration, line["proxy"], line["gold"], line.get("diversity")))
        self._lines.append(line)
        self._write()
        found = self.verdict()
        numbers |= {"gold_drop": found.drop, "gold_drop_error": found.error, "gap": self._gap()}
        numbers["over_optimizing"] = float(found.since is not None)
        return numbers

    def verdict(self) -> Verdict:
        """What the readings say until now."""
        return verdict(self.readings)

    @property
    def is_best(self) -> bool:
        """Whether the last reading's gold is the highest."""
        return self.verdict().best == self.readings[-1].iteration

    def _gap(self) -> float:
        first, last = self._lines[0], self._lines[-1]
        of_gold = float(torch.tensor(first["gold"]).double().std())
        gold = self.readings[-1].mean - self.readings[0].mean
        proxy = last["proxy"] - first["proxy"]
        return _in_units(proxy, first["proxy_std"]) - _in_units(gold, of_gold)

    def _write(self) -> None:
        text = "".join(json.dumps(line) + "\n" for line in self._lines)
        write_whole(self._path, text.encode())


def _in_units(difference: float, spread: float) -> float:
    return difference / spread if spread else 0.0


def read_monitor(out: Path) -> list[Reading]:
    """The readings of a run; none if it has no monitor."""
    path = out / FILE
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        Reading(line["iteration"], line["proxy"], line["gold"], line.get("diversity"))
        for line in lines
    ]
