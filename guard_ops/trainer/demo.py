"""The demo: one pretrained digits flow, fine-tuned with three objectives, judged by gold."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .config import TrainConfig
from .digits import DigitPolicy, load_digits, load_or_pretrain, sample
from .jobs import EVALUATION_SEED, LEARNING_RATE, OBJECTIVES, SCHEDULE, digits_trainer, judge
from .judges import Gold, ProxyReward
from .metrics import read_metrics
from .progress import progress_bar


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


def run_demo(out: Path, seeds: list[int], iterations: int, pretrain_steps: int) -> DemoResult:
    """Run everything and write ``metrics.jsonl`` and, for every seed, its pictures under ``out``.

    ``seed-N/pretrained.safetensors`` is reused by the next run with the same settings; everything
    else is made again.
    """
    from . import plots  # needs matplotlib

    started = time.perf_counter()
    configs = [
        TrainConfig(
            iterations=iterations,
            learning_rate=LEARNING_RATE,
            seed=seed,
            evaluate_every=max(1, iterations // 12),
            checkpoint_every=0,
            tensorboard=False,
        )
        for seed in seeds
    ]
    digits = load_digits()
    judges = ProxyReward(digits), Gold(digits)
    results = []
    for config in configs:
        seed = config.seed
        folder = out / f"seed-{seed}"
        with progress_bar(f"seed {seed}: pretraining", pretrain_steps) as bar:
            start = load_or_pretrain(
                folder / "pretrained.safetensors", seed, pretrain_steps, lambda n: bar(n, "")
            )
            bar(pretrain_steps, "")
        at_start = {"iteration": 0, **judge(start, *judges)}
        runs = {
            name: _fine_tune(start, name, config, folder, judges, at_start) for name in OBJECTIVES
        }
        results.append(SeedResult(seed, _few(start), runs))
        plots.draw(results[-1], digits, folder)
    _write_metrics(out / "metrics.jsonl", results)
    seconds = time.perf_counter() - started
    accuracies = judges[0].accuracy, judges[1].accuracy
    return DemoResult(results, configs[0], pretrain_steps, *accuracies, seconds)


def _fine_tune(
    start: DigitPolicy,
    objective: str,
    config: TrainConfig,
    folder: Path,
    judges: tuple[ProxyReward, Gold],
    at_start: dict[str, float],
) -> Run:
    policy = copy.deepcopy(start)
    out = folder / objective
    trainer = digits_trainer(policy, objective, config, out, judges)
    trainer.fit(title=f"seed {config.seed}: {objective}")
    trainer.close()
    lines = read_metrics(out / "metrics.jsonl")
    names = ("iteration", *at_start)
    evaluations = [{name: line[name] for name in names} for line in lines if "gold" in line]
    return Run(lines, [at_start, *evaluations], _few(policy))


def _few(policy: DigitPolicy) -> Tensor:
    return sample(policy, SCHEDULE, 8, EVALUATION_SEED)[0]


def _write_metrics(path: Path, results: list[SeedResult]) -> None:
    """Every line of every run, with its seed and objective."""
    lines = [
        json.dumps({"seed": result.seed, "objective": name, **line})
        for result in results
        for name, run in result.runs.items()
        for line in run.lines
    ]
    path.write_text("\n".join(lines) + "\n")
