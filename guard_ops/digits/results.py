"""What a demo gives."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..trainer.config import TrainConfig


class Run(NamedTuple):
    """What one fine-tuning gives."""

    lines: list[dict[str, Any]]  # metrics.jsonl
    evaluations: list[dict[str, float]]  # iteration, proxy, gold ...; the start is iteration 0
    samples: Tensor  # [80, 1, 8, 8] at the end, 8 of each class


class SeedResult(NamedTuple):
    """The three fine-tunings of one pretrained model."""

    seed: int
    start: Tensor  # [80, 1, 8, 8] samples before fine-tuning
    runs: dict[str, Run]  # by objective


class DemoResult(NamedTuple):
    seeds: list[SeedResult]
    config: TrainConfig
    pretrain_steps: int
    proxy_accuracy: float
    gold_accuracy: float
    seconds: float
