"""The study's runs: which there are, and what one gives: a JSON file that is written at its end."""

from __future__ import annotations

import base64
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import guard_ops as go
from guard_ops.digits.policy import sigmas
from guard_ops.monitor.rule import paired
from guard_ops.trainer import TrainConfig, Trainer
from guard_ops.trainer.folder import write_whole
from guard_ops.trainer.metrics import read_metrics

from .tasks import TASKS, Judged, Task, sample

SAMPLERS: dict[str, dict[str, Any]] = {
    "flow": {"sde": "flow_sde", "noise_level": 0.7},
    "dance": {"sde": "dance_sde", "noise_level": 0.3},
}
OBJECTIVES = ("plain", "paper", "article")
ABLATIONS: dict[str, dict[str, Any]] = {  # of digits with Flow-GRPO's sampler, one seed
    "article, max_grad_norm 0.01": {"of": "article", "max_grad_norm": 0.01},
    "article, target_std 0.001, clip 0.0002": {
        "of": "article", "target_std": 0.001, "clip_low": 0.0002, "clip_high": 0.0002,
    },
    "article, RatioNorm alone": {"of": "article", "balance": "none"},
    "article, balancing alone": {
        "of": "article", "ratio_norm": "none", "clip_low": 1e-3, "clip_high": 1e-3,
    },
    "article, detach_stats=False": {"of": "article", "detach_stats": False},
    "paper, RatioNorm alone": {"of": "paper", "balance": "none"},
    "plain, max_grad_norm 0.01": {"of": "plain", "max_grad_norm": 0.01},
}  # fmt: skip
STEPS = (
    "ratio_bias", "ratio_std", "ratio_hat_bias", "ratio_hat_std", "clip_fraction",
    "clip_fraction_high", "clip_fraction_low",
)  # fmt: skip
FIRST_SEED = 3  # the monitor's thresholds were set on runs of seeds 0 to 2
QUARTERS = 4  # of training, over which per-step numbers are averaged
EVALUATION_SEED = 2**40  # no run has this seed; evaluation always samples from the same noise
READ = 200  # samples whose gold is kept one by one: what the monitor has by default


class Spec(NamedTuple):
    """A run."""

    task: str
    sampler: str
    objective: str  # of OBJECTIVES or ABLATIONS
    seed: int

    @property
    def name(self) -> str:
        words = "".join(c if c.isalnum() or c in ".-" else " " for c in self.objective).split()
        return "-".join((self.task, self.sampler, *words, f"s{self.seed}"))

    def settings(self) -> dict[str, Any]:
        """What decides the run's numbers: its schedule, objective and training."""
        task, change = TASKS[self.task], dict(ABLATIONS.get(self.objective, {}))
        of = change.pop("of", self.objective)
        training = {**task.training, **SAMPLERS[self.sampler], "seed": self.seed}
        if "max_grad_norm" in change:
            training["max_grad_norm"] = change.pop("max_grad_norm")
        if of in task.clips:
            change = {"clip_low": task.clips[of], "clip_high": task.clips[of], **change}
        return {
            "of": of, "guard": change, "training": training,
            "pretrain_steps": task.pretrain_steps, "per_prompt": task.per_prompt,
        }  # fmt: skip

    def guard(self) -> go.GuardConfig:
        """The objective."""
        settings = self.settings()
        made = {
            "plain": go.GuardConfig.flow_grpo,
            "paper": go.GuardConfig.paper,
            "article": go.GuardConfig.article,
        }[settings["of"]]
        return made(**settings["guard"])


def specs(seeds: Sequence[int]) -> list[Spec]:
    """All runs: the first three seeds of everything, then the ablations, then further seeds."""

    def of(some: Sequence[int]) -> list[Spec]:
        return [
            Spec(task, sampler, objective, seed)
            for seed in some
            for task in TASKS
            for sampler in SAMPLERS
            for objective in OBJECTIVES
        ]

    ablations = [Spec("digits", "flow", name, seed) for name in ABLATIONS for seed in seeds[:1]]
    return of(seeds[:3]) + ablations + of(seeds[3:])


def finished(spec: Spec, results: Path) -> bool:
    """Whether the folder has this run, with today's settings."""
    path = results / f"{spec.name}.json"
    return path.exists() and json.loads(path.read_text())["settings"] == spec.settings()


def perform(spec: Spec, task: Task, pretrained: Path, results: Path) -> float:
    """Train one run and write its JSON file, whole or not at all; returns its CPU seconds."""
    settings, started = spec.settings(), time.process_time()
    policy = task.policy(pretrained, spec.seed)
    sampler = SAMPLERS[spec.sampler]
    schedule = go.SdeSchedule(sigmas(10), noise_level=sampler["noise_level"], kind=sampler["sde"])
    labels = torch.arange(len(task.prompts)).repeat_interleave(task.per_prompt)
    few = _few(len(task.prompts), task.per_prompt)
    found: list[Judged] = []
    samples: list[Tensor] = []

    def evaluate() -> dict[str, float]:
        samples.append(sample(policy, schedule, labels, EVALUATION_SEED))
        found.append(task.judge(samples[-1], labels))
        return {"proxy": float(found[-1].proxy.mean())}

    def reward(pixels: Tensor, prompts: Sequence[str], metadata: object) -> Tensor:
        return task.reward(2 * pixels[:, :1] - 1, policy.encode(prompts)["label"])

    evaluate()
    config = TrainConfig(**settings["training"], checkpoint_every=0, tensorboard=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            policy,
            reward,
            list(task.prompts),
            spec.guard(),
            config,
            folder,
            optimizer=lambda parameters: torch.optim.AdamW(
                parameters, lr=config.learning_rate, weight_decay=0.0, fused=True
            ),
            evaluate=evaluate,
        )
        trainer.fit(progress=False)
        trainer.close()
        lines = read_metrics(Path(folder) / "metrics.jsonl")
    iterations = [0, *(line["iteration"] for line in lines if "proxy" in line)]
    # positive where gold fell; over all samples, paired
    drop, error = paired(found[0].gold.tolist(), found[-1].gold.tolist())
    result = {
        **spec._asdict(),
        "settings": settings,
        "evaluations": [
            _rounded(
                {
                    "iteration": n,
                    "proxy": float(x.proxy.mean()),
                    "gold": float(x.gold.mean()),
                    "diversity": x.diversity,
                    "frechet": x.frechet,
                }
            )
            for n, x in zip(iterations, found, strict=True)
        ],
        "gold_change": _rounded([-drop, error]),
        "gold_each": [_packed(x.gold[few]) for x in found],
        "grad_norm": _rounded(_quarters([line["grad_norm"] for line in lines])),
        "steps": {name: _rounded(_quarters([x[name] for x in lines])) for name in STEPS},
        "cpu_seconds": round(time.process_time() - started, 1),
    }
    if spec.seed == FIRST_SEED and spec.objective in OBJECTIVES:
        ends = (samples[0], samples[-1])
        result["samples"] = [
            _packed((x[:: task.per_prompt][:10].clamp(-1, 1) + 1) / 2) for x in ends
        ]
    results.mkdir(parents=True, exist_ok=True)
    write_whole(results / f"{spec.name}.json", json.dumps(result).encode() + b"\n")
    return float(result["cpu_seconds"])


def golds(run: dict[str, Any]) -> list[list[float]]:
    """Gold of the same samples at each evaluation."""
    return [unpacked(text) for text in run["gold_each"]]


def _few(prompts: int, each: int) -> Tensor:
    """Rows of READ samples, as many of each prompt."""
    return (torch.arange(prompts)[:, None] * each + torch.arange(READ // prompts)).flatten()


def _packed(x: Tensor) -> str:
    """Numbers in [0, 1] at 8 bits, in base 64."""
    return base64.b64encode((255 * x.flatten()).round().byte().numpy().tobytes()).decode()


def unpacked(text: str) -> list[float]:
    """What :func:`_packed` was given, to 1/510."""
    return [x / 255 for x in base64.b64decode(text)]


def _quarters(rows: list[Any]) -> Any:
    """Means over each quarter of training."""
    x = torch.tensor(rows, dtype=torch.float64)
    return torch.stack([part.mean(0) for part in x.chunk(QUARTERS)]).tolist()


def _rounded(x: Any) -> Any:
    """To four digits, which is more than seeds agree on."""
    if isinstance(x, dict):
        return {name: _rounded(value) for name, value in x.items()}
    if isinstance(x, list):
        return [_rounded(value) for value in x]
    return x if isinstance(x, int) else float(f"{x:.4g}")
