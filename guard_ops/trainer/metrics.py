"""Metrics of a run: one JSON object a line, and TensorBoard."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .extras import require


class MetricsWriter:
    """Appends to ``metrics.jsonl`` (and ``tensorboard/``) of a run.

    A line is ``{"iteration": n, name: number | [a number per step], ...}``; a number that is not
    finite is null. :meth:`start` cuts off what a killed run wrote after its last checkpoint.
    """

    def __init__(self, out: Path, *, tensorboard: bool) -> None:
        self.path = out / "metrics.jsonl"
        self._folder = out / "tensorboard"
        self._tensorboard = tensorboard
        self._board: Any = None

    def start(self, iteration: int, size: int) -> None:
        """Continue after ``iteration``, whose line ended at byte ``size``."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")
        self._file.truncate(min(size, self._file.tell()))
        if self._tensorboard:
            writer = require("torch.utils.tensorboard", "train").SummaryWriter
            self._board = writer(str(self._folder), purge_step=iteration + 1)

    def write(self, iteration: int, numbers: dict[str, Any]) -> None:
        """Add the line of ``iteration``."""
        line = {"iteration": iteration} | {name: _finite(x) for name, x in numbers.items()}
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()
        if self._board is None:
            return
        for name, value in numbers.items():
            if not isinstance(value, list):
                self._board.add_scalar(name, value, iteration)
                continue
            for k, x in enumerate(value):
                self._board.add_scalar(f"{name}/step_{k}", x, iteration)

    def sync(self) -> int:
        """Put what was written on the disk; returns the size of ``metrics.jsonl`` in bytes."""
        os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _finite(value: Any) -> Any:
    """``value`` with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return value if value - value == 0 else None
