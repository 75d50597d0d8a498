"""The frameworks' own arithmetic, restated: what the drop-ins are compared with.

Their steps and losses are :mod:`benchmarks.baselines` (which is checked against recorded numbers of
the real code); here is what their scripts add to them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import baselines


def step(scheduler, kind, model_output, timestep, sample, prev_sample, noise_level=0.7):
    """A framework's step at a given next latent, its index looked up as diffusers does."""
    index = torch.tensor([scheduler.index_for_timestep(t) for t in timestep])
    numbers = baselines.scheduler_step(scheduler.sigmas, index, noise_level, sample.ndim - 1)
    return baselines.SDE_STEPS[kind](model_output, sample, prev_sample, numbers)


def surrogate(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))


def flow_grpo_guard(out, old_log_prob, old_mean, advantages, clip, adv_clip):
    """The published GRPO-Guard script of flow_grpo: its bias is one number for the batch."""
    scale = out.sqrt_dt.mean() * out.std_dev_t.mean()
    bias = (out.prev_sample_mean - old_mean).pow(2).mean() / (2 * scale**2)
    ratio = torch.exp((out.log_prob - old_log_prob + bias) * scale)
    losses = surrogate(ratio, advantages.clamp(-adv_clip, adv_clip), clip, clip)
    return losses.mean() / out.sqrt_dt.mean() ** 2


def flow_factory_guard(out, old_log_prob, old_mean, advantages, clip, adv_clip):
    """Flow-Factory's: each sample's own scale, nothing divided by dt."""
    scale = (out.sqrt_dt * out.std_dev_t).flatten()
    square = (out.prev_sample_mean - old_mean).flatten(1).pow(2).mean(1)
    ratio = torch.exp((out.log_prob - old_log_prob) * scale + square / (2 * scale))
    return surrogate(ratio, advantages.clamp(-adv_clip, adv_clip), clip, clip).mean()


def metrics(ratio_minus_one: Tensor, clip: float) -> dict[str, float]:
    """verl-omni's, of the ratio."""
    return {
        "actor/pg_clipfrac": (ratio_minus_one.abs() > clip).double().mean().item(),
        "actor/ratio_mean": 1 + ratio_minus_one.mean().item(),
        "actor/ratio_std": ratio_minus_one.std().item(),
    }
