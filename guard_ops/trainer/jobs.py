"""The digits job: one objective, the digits policy, its proxy reward and its gold."""

from __future__ import annotations

from pathlib import Path

import torch

import guard_ops as go

from .config import TrainConfig
from .digits import CLASSES, DigitPolicy, sample, sigmas
from .judges import Gold, ProxyReward
from .loop import Trainer

OBJECTIVES: dict[str, go.GuardConfig] = {
    "flow_grpo": go.GuardConfig.flow_grpo(clip_low=1e-3, clip_high=1e-3),
    "paper": go.GuardConfig.paper(clip_low=1e-4, clip_high=1e-4),
    "article": go.GuardConfig.article(),
}
CLIPS = """\
The clips of the first two are 10 and 50 times the published ones: these latents have 64 elements
where an image model's have 65,536, so the ratio, a mean over elements, spreads wider."""

SCHEDULE = go.SdeSchedule(sigmas(10), noise_level=0.7, kind="flow_sde")
LEARNING_RATE = 4e-4
EVALUATION_SEED = 2**40  # no run has this seed; evaluation always samples from the same noise
EVALUATION_SAMPLES = 100  # per class


def judge(policy: DigitPolicy, proxy: ProxyReward, gold: Gold) -> dict[str, float]:
    """Proxy and gold of samples of the policy as it is now."""
    samples, condition = sample(policy, SCHEDULE, EVALUATION_SAMPLES, EVALUATION_SEED)
    return {"proxy": float(proxy(samples, condition).mean()), **gold(samples, condition)}


def digits_trainer(
    policy: DigitPolicy,
    objective: str,
    config: TrainConfig,
    out: Path,
    judges: tuple[ProxyReward, Gold],
    *,
    resume: bool = False,
) -> Trainer:
    """A trainer of ``policy`` with ``OBJECTIVES[objective]``, evaluated by :func:`judge`."""
    proxy, gold = judges
    return Trainer(
        policy,
        proxy,
        torch.arange(CLASSES),
        SCHEDULE,
        OBJECTIVES[objective],
        config,
        out,
        resume=resume,
        optimizer=torch.optim.AdamW(
            policy.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        ),
        evaluate=lambda: judge(policy, proxy, gold),
    )
