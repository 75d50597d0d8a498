"""What a page's reader has before its first snippet: the model, tensors and names of his own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import guard_ops as go

STEPS, TRAINED, BATCH, LATENT = 5, 4, 4, (4, 8, 8)
NOT_RUN = {"docs/swap-in.md": "its snippets belong into frameworks and pipelines"}


def given(page: str) -> dict[str, Any]:
    """The page's namespace; pages without an entry begin with nothing."""
    return GIVEN[page]() if page in GIVEN else {}


def _api() -> dict[str, Any]:
    """A rollout of four trained steps, and the same as two micro-batches."""
    torch.manual_seed(0)
    network = nn.Conv2d(4, 4, 1)
    schedule = go.SdeSchedule(torch.linspace(1, 0, STEPS + 1))
    seeds = go.philox_seed(0, (TRAINED, BATCH))
    x = [torch.randn(BATCH, *LATENT)]

    def model(latents: Any, t: float | None = None) -> Any:
        if isinstance(latents, SimpleNamespace):
            latents = latents.latents
        if latents.dim() == 5:
            return torch.stack([network(one) for one in latents])
        return network(latents)

    v_old = []
    with torch.no_grad():
        for k in range(TRAINED):
            v_old.append(model(x[k]))
            x.append(go.sde_step(v_old[k], x[k], schedule[k], seed=seeds[k]).prev_sample)
        network.weight.add_(0.01 * torch.randn_like(network.weight))
    old, noise = torch.stack(v_old), torch.randn(TRAINED, BATCH, *LATENT)
    halves = (slice(0, BATCH // 2), slice(BATCH // 2, BATCH))
    advantages = torch.linspace(-1, 1, BATCH)
    batches = [
        SimpleNamespace(
            latents=torch.stack(x[:TRAINED])[:, rows],
            A=advantages[rows],
            share=0.5,
            form={"old_model_output": old[:, rows], "seed": seeds[:, rows]},
        )
        for rows in halves
    ]
    return {
        "torch": torch, "go": go, "model": model, "x": x, "t": schedule.sigmas, "K": TRAINED,
        "A": advantages, "schedule": schedule, "coeffs": schedule[:TRAINED], "v_old": old,
        "seeds": seeds, "batches": batches, "eps": noise, "eps_high": 1e-3,
    }  # fmt: skip


def _trainer() -> dict[str, Any]:
    from guard_ops.trainer import Schedule

    return {"nn": nn, "Schedule": Schedule}


GIVEN = {
    "docs/api.md": _api,
    "docs/trainer.md": _trainer,
    "docs/writing-a-loop.md": lambda: {"network": lambda x, t: x},
}
