"""UniRL: ``denoise`` of its SDE strategies, and Flow-DPPO's loss."""

from __future__ import annotations

from typing import Any

import torch

from ..proof import OMITTED, Cases
from . import operands


def denoise(owner: Any) -> Cases:
    """Of one strategy; an ``eta`` of 0 gives no log-prob."""
    sigmas = torch.linspace(1, 0, operands.STEPS + 1, dtype=torch.float64)
    sigmas = 3 * sigmas / (1 + 2 * sigmas)

    def build(chosen: dict[str, Any]) -> dict[str, Any]:
        v, x, y = operands.transition(chosen)
        numbers = operands.step_numbers(chosen["_steps"])
        sigma, following = sigmas[numbers], sigmas[[k + 1 for k in numbers]]
        if chosen["_sigma"] == "[]":
            sigma, following = sigma[0], following[0]
        return {
            "self": owner(),
            "noise_pred": v,
            "sample": x,
            "sigma": sigma,
            "sigma_next": following,
            "prev_sample": None if y is None else y.float() + 1e-3,  # no bfloat16
            **operands.optional(chosen),
        }

    options = {
        "_sampling": ("given", "its default"),
        "_learns": operands.LEARNS,
        "eta": (0.7, OMITTED, 0.3, 0.0),
        "sigma_max": (OMITTED, 0.9),
        "step_index": (OMITTED, 2),
        "_steps": ("middle", "mixed", "first", "last"),
        "_sigma": ("[B]", "[]"),
        "_shape": ((4, 4, 4), (6, 8), (2, 2, 4, 4)),
        "_dtype": (torch.float32, torch.bfloat16),
    }
    return Cases(options, build)


def flowdppo(owner: Any) -> Cases:
    """``_flowdppo_kl_adv_loss`` of transitions some of which have moved too far."""

    def build(chosen: dict[str, Any]) -> dict[str, Any]:
        steps, latent = chosen["_steps"], (4, 4, 4)
        shape = (operands.BATCH, steps, *latent)
        means, old_logp = operands.noise(shape, 1), operands.noise(shape[:2], 2)
        new_logp = old_logp + 0.01 * operands.noise(shape[:2], 3)
        moved = means + 0.01 * operands.noise(shape, 4)
        spread = torch.linspace(0.3, 0.6, steps) if chosen["_divides"] else torch.ones(steps)
        new_logp.requires_grad_(chosen["_learns"])
        moved.requires_grad_(chosen["_learns"])
        return {
            "new_logp": new_logp,
            "old_logp": old_logp,
            "new_means": moved,
            "old_means": means,
            "advantages": operands.noise((operands.BATCH, 1), 5).expand(shape[:2]),
            "sigma_t": spread.reshape(1, steps, 1, 1, 1),
            **operands.optional(chosen),
        }

    options = {
        "_steps": (4, 1),
        "_learns": operands.LEARNS,
        "_divides": (True, False),
        "kl_mask_threshold": (2.4e-4, 0.0, 1.0),
    }
    return Cases(options, build)
