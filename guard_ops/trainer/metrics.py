"""Metrics of a run: one JSON object a line, and TensorBoard."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guard_ops.objective import Metrics

from .engine import Engine
from .extras import require
from .folder import aside, write_whole, writing
from .policy import Scores


class MetricsWriter:
    """Appends to ``metrics.jsonl`` (and ``tensorboard/``) of a run.

    A line is ``{"iteration": n, name: number | [a number per step], ...}``; a number that is not
    finite is null. Checkpoints hold all lines up to theirs: what happens to the file is mended.
    """

    def __init__(self, out: Path, *, tensorboard: bool) -> None:
        self.path = out / "metrics.jsonl"
        self._folder = out / "tensorboard"
        self._text: list[bytes] = []
        self._file: Any = None
        self._board: Any = None
        self._summary_writer = tensorboard and require("torch.utils.tensorboard", "train")

    def start(self, iteration: int, text: str | None) -> None:
        """Continue after ``iteration``, up to which the file holds ``text``; None begins a run.

        What a killed run wrote after its last checkpoint is cut off. A file that does not begin
        with ``text`` is set aside, with a RuntimeWarning, and written again.
        """
        expected = (text or "").encode()
        self._text = [expected]
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            found = self.path.read_bytes() if self.path.exists() else b""
            if found and text is None:
                self._set_aside("it is of another run, which has no checkpoints")
            elif not found.startswith(expected):
                self._mend(found, expected)
            self._file = self.path.open("ab")
            self._file.truncate(len(expected))
            if self._summary_writer:
                writer = self._summary_writer.SummaryWriter
                self._board = writer(str(self._folder), purge_step=iteration + 1)

    def _mend(self, found: bytes, expected: bytes) -> None:
        """Write the file again as the checkpoint has it."""
        lines = expected.count(b"\n")
        if found:
            fault = "is cut off" if expected.startswith(found) else "was changed"
            self._set_aside(f"it {fault}; written again from the checkpoint, {lines} lines")
        else:
            _warn(f"{self.path} is gone; written again from the checkpoint, {lines} lines")
        write_whole(self.path, expected)

    def _set_aside(self, reason: str) -> None:
        kept = aside(self.path, "aside")
        self.path.rename(kept)
        _warn(f"{self.path} is kept as {kept.name}: {reason}")

    def write(self, iteration: int, numbers: dict[str, Any]) -> None:
        """Add the line of ``iteration``."""
        line = {"iteration": iteration} | {name: _finite(x) for name, x in numbers.items()}
        text = json.dumps(line, allow_nan=False).encode() + b"\n"
        with writing(self.path):
            self._file.write(text)
            self._file.flush()
        self._text.append(text)
        if self._board is None:
            return
        with writing(self._folder):
            for name, value in numbers.items():
                if not isinstance(value, list):
                    self._board.add_scalar(name, value, iteration)
                    continue
                for k, x in enumerate(value):
                    self._board.add_scalar(f"{name}/step_{k}", x, iteration)

    def sync(self) -> str:
        """Put what was written on the disk; returns all of it."""
        with writing(self.path):
            os.fsync(self._file.fileno())
        if self._board is not None:
            with writing(self._folder):
                self._board.flush()
        return b"".join(self._text).decode()

    def close(self) -> None:
        """Close the files, as far as :meth:`start` came."""
        try:
            if self._file is not None:
                with writing(self.path):
                    self._file.close()
        finally:
            if self._board is not None:
                with writing(self._folder):
                    self._board.close()


class Sums:
    """An iteration's numbers, of which each rank has a part; they are put together once."""

    def __init__(self, scores: Scores) -> None:
        self.rewards = scores.total.double()
        self.parts = {name: value.double() for name, value in scores.parts.items()}
        self.updates: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, weight: Tensor, loss: Tensor, norm: Tensor, metrics: Metrics) -> None:
        """An update: what the rank's means weigh, and the means."""
        self.names = metrics._fields
        rows = dict(zip(self.names, torch.stack(list(metrics)).double(), strict=True))
        # A spread about the rank's own mean becomes a mean square, which can be averaged.
        for std, bias in _SPREADS.items():
            rows[std] = rows[std].square() + rows[bias].square()
        weighted = {name: weight * row for name, row in rows.items()}
        weighted["nonfinite"] = rows["nonfinite"]  # a count
        self.updates.append((torch.stack(list(weighted.values())), weight * loss, norm))

    def over(self, engine: Engine) -> dict[str, Tensor]:
        """Means over the updates and all ranks, [] or [K] float64."""
        per_step, losses, norms = (torch.stack(x) for x in zip(*self.updates, strict=True))
        count = torch.full((), len(self.rewards), dtype=torch.float64, device=engine.device)
        parts = torch.stack([count, self.rewards.sum(), *self._part_sums()])
        flat = torch.cat([parts[:2], losses.double(), per_step.flatten(), parts[2:]])
        flat = engine.sum(flat)
        flat, of_parts = flat.split([len(flat) - 2 * len(self.parts), 2 * len(self.parts)])
        count, mean = flat[0], flat[1] / flat[0]
        losses = flat[2 : 2 + len(losses)] / engine.ranks
        per_step = flat[2 + len(losses) :].reshape(per_step.shape) / engine.ranks
        square = engine.sum((self.rewards - mean).square().sum()) / count
        numbers = {"reward": mean, "reward_std": square.sqrt()}
        for name, (total, there) in zip(self.parts, of_parts.reshape(-1, 2), strict=False):
            numbers[f"reward_{name}"] = total / there  # NaN where no sample has this part
        numbers |= {"loss": losses.mean(), "grad_norm": norms.double().mean()}
        steps = dict(zip(self.names, per_step.unbind(1), strict=True))  # each [updates, K]
        for std, bias in _SPREADS.items():
            steps[std] = (steps[std] - steps[bias].square()).clamp(min=0).sqrt()
        steps["nonfinite"] = steps["nonfinite"] * engine.ranks
        return numbers | {name: value.mean(0) for name, value in steps.items()}

    def _part_sums(self) -> list[Tensor]:
        """Of each part the sum over the samples that have it, and their number."""
        found = []
        for value in self.parts.values():
            there = value.isfinite()
            found += [torch.where(there, value, 0.0).sum(), there.double().sum()]
        return found


def write_ratios(out: Path, iteration: int, ratios: Mapping[str, Tensor]) -> None:
    """Keep the first rank's ratios of an update, for histograms: ``ratios/iteration-000020...``."""
    save = require("safetensors.torch", "train").save
    path = out / "ratios" / f"iteration-{iteration:06d}.safetensors"
    with writing(path):
        path.parent.mkdir(exist_ok=True)
    write_whole(path, save({name: x.float().cpu().contiguous() for name, x in ratios.items()}))


_SPREADS = {"ratio_std": "ratio_bias", "ratio_hat_std": "ratio_hat_bias"}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _finite(value: Any) -> Any:
    """``value`` with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return value if value - value == 0 else None


def _warn(text: str) -> None:
    warnings.warn(f"guard_ops: {text}", RuntimeWarning, stacklevel=7)
