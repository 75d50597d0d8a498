"""TensorBoard, Weights & Biases, trackio ...: what accelerate can log to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..trainer.extras import require
from .pictures import grid

NAMES = ("tensorboard", "wandb", "trackio")


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError for a tracker that there is not, or whose package is not installed."""
    tracking = require("accelerate.tracking", "models")
    available = {getattr(n, "value", n) for n in tracking.get_available_trackers()}
    for name in names:
        if name not in NAMES:
            raise ValueError(f"`trackers` has {name!r}; it needs any of {', '.join(NAMES)}")
        if name not in available or name not in tracking.LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"`trackers` has {name!r}, which is not installed here")


class Trackers:
    """Numbers and pictures of one run, to each tracker; only on the first rank.

    TensorBoard's numbers are the trainer's own writer's, which knows how to continue a killed run.

    Raises:
        ValueError: see :func:`check_trackers`.
    """

    def __init__(self, names: Sequence[str], out: Path, settings: Mapping[str, Any]) -> None:
        check_trackers(names)
        # its log lines ask for this; the process group is there already
        require("accelerate", "models").PartialState(cpu=not torch.cuda.is_available())
        known = require("accelerate.tracking", "models").LOGGER_TYPE_TO_CLASS
        self._trackers: list[tuple[str, Any]] = []
        for name in names:
            kind = known[name]
            if name == "tensorboard":
                tracker = kind("tensorboard", logging_dir=str(out))
            else:
                tracker = kind(out.name)
            tracker.main_process_only = False  # this is the first rank, which is not asked again
            if hasattr(tracker, "start"):
                tracker.start()
            if name != "tensorboard":
                tracker.store_init_configuration(dict(settings))
            self._trackers.append((name, tracker))

    def log(self, iteration: int, numbers: Mapping[str, Any]) -> None:
        """A line of the metrics; a list has a number for each step."""
        flat: dict[str, float] = {}
        for name, value in numbers.items():
            if isinstance(value, list):
                flat |= {f"{name}/step_{k}": x for k, x in enumerate(value)}
            else:
                flat[name] = value
        for name, tracker in self._trackers:
            if name != "tensorboard":
                tracker.log(flat, step=iteration)

    def show(self, iteration: int, pixels: Tensor) -> None:
        """A grid of pictures, of a video its middle frame."""
        frames = grid(pixels)
        sheet = frames[len(frames) // 2].numpy()
        for name, tracker in self._trackers:
            if name == "tensorboard":
                tracker.log_images({"samples": sheet[None]}, iteration, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({"samples": [sheet]}, step=iteration)

    def close(self) -> None:
        for _, tracker in self._trackers:
            tracker.finish()
