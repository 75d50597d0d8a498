"""The demo: one pretrained digits flow, fine-tuned with three objectives, judged by gold."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

from torch import Tensor

from ..trainer.config import TrainConfig
from ..trainer.extras import require
from ..trainer.folder import FolderLock, RunFolderError, write_whole, writing
from ..trainer.metrics import read_metrics
from .jobs import (
    EVALUATION_SEED,
    LEARNING_RATE,
    OBJECTIVES,
    SCHEDULE,
    digits_trainer,
    judge,
    pretrained,
)
from .judges import Gold, ProxyReward
from .policy import DigitPolicy, load_digits, sample
from .results import DemoResult, Run, SeedResult


def run_demo(out: Path, seeds: list[int], iterations: int, pretrain_steps: int) -> DemoResult:
    """Run everything and write ``metrics.jsonl`` and, for every seed, its pictures under ``out``.

    What an interrupted demo of the same settings has done is not done again: pretraining and runs
    continue from their checkpoints. Another one's folder is refused.
    """
    from . import plots  # needs matplotlib

    require("matplotlib.pyplot", "demo")
    started = time.perf_counter()
    configs = [
        TrainConfig(
            iterations=iterations,
            learning_rate=LEARNING_RATE,
            seed=seed,
            evaluate_every=max(1, iterations // 12),
            checkpoint_every=max(1, iterations // 12),
            keep_checkpoints=2,
            tensorboard=False,
        )
        for seed in seeds
    ]
    digits = load_digits()
    lock = FolderLock(out)
    try:
        _same_settings(
            out / "demo.json", {"iterations": iterations, "pretrain_steps": pretrain_steps}
        )
        judges = ProxyReward(digits), Gold(digits)
        results = []
        for config in configs:
            folder = out / f"seed-{config.seed}"
            start = pretrained(folder, config.seed, pretrain_steps, f"seed {config.seed}: ")
            at_start = {"iteration": 0, **judge(start, *judges)}
            runs = {
                name: _fine_tune(start, name, config, pretrain_steps, folder, judges, at_start)
                for name in OBJECTIVES
            }
            results.append(SeedResult(config.seed, _few(start), runs))
            with writing(folder):
                plots.draw(results[-1], digits, folder)
        _write_metrics(out / "metrics.jsonl", results)
    finally:
        lock.release()
    seconds = time.perf_counter() - started
    accuracies = judges[0].accuracy, judges[1].accuracy
    return DemoResult(results, configs[0], pretrain_steps, *accuracies, seconds)


def _same_settings(path: Path, settings: dict[str, int]) -> None:
    """Refuse the folder of a demo with other settings; keep them for the next one to see."""
    try:
        then = json.loads(path.read_text())
        different = [name for name in settings if then[name] != settings[name]]
    except FileNotFoundError:
        write_whole(path, json.dumps(settings).encode() + b"\n")
        return
    except (OSError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise RunFolderError(
            f"{path} does not say which settings this demo was begun with ({error}); choose "
            "another `out`"
        ) from error
    for name in different:
        raise ValueError(
            f"`{name}` is {settings[name]} but the demo in `out` was begun with {then[name]}; "
            "continue with the same or choose another `out`"
        )


def _fine_tune(
    start: DigitPolicy,
    objective: str,
    config: TrainConfig,
    pretrain_steps: int,
    folder: Path,
    judges: tuple[ProxyReward, Gold],
    at_start: dict[str, float],
) -> Run:
    policy = copy.deepcopy(start)
    out = folder / objective
    trainer = digits_trainer(policy, objective, config, pretrain_steps, out, judges, resume=True)
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
    write_whole(path, "\n".join(lines).encode() + b"\n")
