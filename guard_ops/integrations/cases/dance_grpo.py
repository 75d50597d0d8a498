"""DanceGRPO: ``flux_step`` of its training scripts."""

from __future__ import annotations

from typing import Any

import torch

from ..proof import Cases
from . import operands


def step(owner: Any) -> Cases:
    """``flux_step`` in float32: of a bfloat16 velocity it rounds ``dt v``, and ours does not."""
    sigmas = torch.linspace(1, 0, operands.STEPS + 1)
    sigmas = 3 * sigmas / (1 + 2 * sigmas)

    def build(chosen: dict[str, Any]) -> dict[str, Any]:
        v, x, y = operands.transition(chosen)
        return {
            "model_output": v,
            "latents": x.float(),
            "eta": chosen["_eta"],
            "sigmas": sigmas.clone(),
            "index": chosen["_index"],
            "prev_sample": None if y is None else y.float(),
            "grpo": chosen["_grpo"],
            "sde_solver": chosen["_sde_solver"],
        }

    options = {
        "_sampling": ("given", "its default"),
        "_learns": operands.LEARNS,
        "_grpo": (True, False),
        "_sde_solver": (True, False),
        "_eta": (0.3, 0.7),
        "_index": (2, 0, operands.STEPS - 1, -3),
        "_shape": ((6, 8), (4, 4, 4), (2, 2, 4, 4)),
        "_dtype": (torch.float32,),
    }
    return Cases(options, build)
