"""Twenty training steps of a small network with a framework's real step and loss, and with ours.

The step is called by the framework's own name in its own module, so that ``apply`` decides whose it
is. Three runs start from one rollout: the original's step and loss; the step swapped by ``apply``;
step and loss swapped.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .tails import TAILS, Scene, Tail

BATCH, STEPS, TRAINED, UPDATES = 6, 8, 6, 20


class Taken(NamedTuple):
    """What every framework's step tells, if it does."""

    prev_sample: Tensor
    log_prob: Tensor
    mean: Tensor
    std_dev_t: Tensor | None
    sqrt_dt: Tensor


# (schedule, v, x, y or None, step number) -> Taken, with the framework's function of this moment
Step = Callable[[Any, Tensor, Tensor, Tensor | None, int], Taken]


@dataclass(frozen=True)
class Loop:
    """A training script: a step on a schedule, and a loss."""

    framework: str
    name: str
    step: Step
    schedule: Callable[[], Any]
    tail: Tail
    latent: tuple[int, ...] = (4, 8, 8)
    sde_type: str = "sde"


class Velocity(nn.Module):
    """A small network of a latent's channels and the step."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(channels + 1, 32), nn.SiLU(), nn.Linear(32, channels))

    def forward(self, x: Tensor, k: int) -> Tensor:
        """x: [B, channels, ...]."""
        last = x.movedim(1, -1)
        time = torch.full((*last.shape[:-1], 1), k / STEPS)
        out: Tensor = self.inner(torch.cat([last, time], -1)).movedim(-1, 1)
        return out


def _root(sigmas: Tensor, k: int, x: Tensor) -> Tensor:
    root = (sigmas[k] - sigmas[k + 1]).sqrt()
    return root.expand(len(x)).reshape(-1, *[1] * (x.ndim - 1))


def _images(sde_type: str) -> Step:
    def step(scheduler: Any, v: Tensor, x: Tensor, y: Tensor | None, k: int) -> Taken:
        module: Any = importlib.import_module("flow_grpo.diffusers_patch.sd3_sde_with_logprob")
        at = scheduler.timesteps[k].expand(len(x))
        return Taken(
            *module.sde_step_with_logprob(
                scheduler, v, at, x, prev_sample=y, sde_type=sde_type, return_sqrt_dt=True
            )
        )

    return step


def _wan(scheduler: Any, v: Tensor, x: Tensor, y: Tensor | None, k: int) -> Taken:
    module: Any = importlib.import_module("flow_grpo.diffusers_patch.wan_pipeline_with_logprob")
    at = scheduler.timesteps[k].expand(len(x))
    return Taken(
        *module.sde_step_with_logprob(
            scheduler, v, at, x, prev_sample=y, return_dt_and_std_dev_t=True
        )
    )


def _bagel(scheduler: Any, v: Tensor, x: Tensor, y: Tensor | None, k: int) -> Taken:
    """One sample a call, as its loop has it."""
    model: Any = importlib.import_module("flow_grpo.bagel.modeling.bagel.bagel").Bagel
    s = scheduler.sigmas
    each = [
        model._sde_step_with_logprob(
            None, v[i], s[k], s[k + 1], s[k + 1] - s[k], x[i],
            prev_sample=None if y is None else y[i], sigma_max=s[1],
        )
        for i in range(len(x))
    ]  # fmt: skip
    prev_sample, log_prob, mean, _ = (torch.stack(part) for part in zip(*each, strict=True))
    return Taken(prev_sample, log_prob, mean, None, _root(s, k, x))


def _flux(scheduler: Any, v: Tensor, x: Tensor, y: Tensor | None, k: int) -> Taken:
    module: Any = importlib.import_module("fastvideo.train_grpo_flux")
    prev_sample, _, log_prob = module.flux_step(v, x, 0.3, scheduler.sigmas, k, y, True, True)
    return Taken(prev_sample, log_prob, log_prob, None, _root(scheduler.sigmas, k, x))


def _verl(sde_type: str) -> Step:
    def step(scheduler: Any, v: Tensor, x: Tensor, y: Tensor | None, k: int) -> Taken:
        at = scheduler.timesteps[k].expand(len(x))
        taken = scheduler.sample_previous_step(
            x, v, at, prev_sample=y, sde_type=sde_type, return_sqrt_dt=True
        )
        return Taken(*taken[:4], taken[4].reshape(-1, *[1] * (x.ndim - 1)))

    return step


def _factory(scheduler: Any, v: Tensor, x: Tensor, y: Tensor | None, k: int) -> Taken:
    at = scheduler.timesteps[k].float()
    then = scheduler.timesteps[k + 1].float()
    out = scheduler.step(v, at, x, y, timestep_next=then, noise_level=0.7)
    return Taken(
        out.next_latents, out.log_prob, out.next_latents_mean, out.std_dev_t, (-out.dt).sqrt()
    )


def _unirl(strategy: str) -> Step:
    def step(scheduler: Any, v: Tensor, x: Tensor, y: Tensor | None, k: int) -> Taken:
        kernels: Any = importlib.import_module("unirl.sde.kernels")
        s = scheduler.sigmas
        taken = getattr(kernels, strategy)().denoise(v, x, s[k], s[k + 1], eta=0.7, prev_sample=y)
        return Taken(*taken, None, _root(s, k, x))

    return step


def _made(path: str, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        module, _, name = path.rpartition(".")
        scheduler = getattr(importlib.import_module(module), name)(**options)
        scheduler.set_timesteps(STEPS)
        return scheduler

    return make


_EULER = _made("diffusers.FlowMatchEulerDiscreteScheduler", shift=3.0)
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
_UNIPC = _made("diffusers.UniPCMultistepScheduler", **_FLOW)
_VERL = _made(
    "verl_omni.pipelines.schedulers.flow_match_sde.FlowMatchSDEDiscreteScheduler", shift=3.0
)
_FACTORY = _made("flow_factory.scheduler.FlowMatchEulerDiscreteSDEScheduler", shift=3.0)
_FACTORY_UNIPC = _made("flow_factory.scheduler.UniPCMultistepSDEScheduler", **_FLOW)
_VIDEO = (4, 2, 4, 4)

LOOPS = (
    Loop("flow_grpo", "image models, sde", _images("sde"), _EULER, TAILS["flow_grpo"]),
    Loop(
        "flow_grpo", "image models, cps", _images("cps"), _EULER, TAILS["flow_grpo"], sde_type="cps"
    ),
    Loop("flow_grpo", "GRPO-Guard", _images("sde"), _EULER, TAILS["flow_grpo, guard"]),
    Loop("flow_grpo", "Wan2.1", _wan, _UNIPC, TAILS["flow_grpo, wan"], _VIDEO),
    Loop("flow_grpo", "Bagel", _bagel, _EULER, TAILS["flow_grpo, bagel"]),
    Loop("dance_grpo", "flux", _flux, _EULER, TAILS["dance_grpo"]),
    Loop("verl_omni", "flow_grpo", _verl("sde"), _VERL, TAILS["verl_omni"]),
    Loop(
        "verl_omni",
        "dance_grpo",
        _verl("dance_sde"),
        _VERL,
        TAILS["verl_omni"],
        sde_type="dance_sde",
    ),
    Loop("verl_omni", "flow_grpo, cps", _verl("cps"), _VERL, TAILS["verl_omni"], sde_type="cps"),
    Loop("verl_omni", "grpo_guard", _verl("sde"), _VERL, TAILS["verl_omni, guard"]),
    Loop("flow_factory", "GRPO", _factory, _FACTORY, TAILS["flow_factory"]),
    Loop("flow_factory", "GRPO-Guard", _factory, _FACTORY, TAILS["flow_factory, guard"]),
    Loop("flow_factory", "GRPO, UniPC", _factory, _FACTORY_UNIPC, TAILS["flow_factory"], _VIDEO),
    Loop("unirl", "FlowGRPO, flow", _unirl("FlowSDEStrategy"), _EULER, TAILS["unirl"]),
    Loop("unirl", "FlowGRPO, dance", _unirl("DanceSDEStrategy"), _EULER, TAILS["unirl"]),
    Loop("unirl", "FlowGRPO, cps", _unirl("CPSSDEStrategy"), _EULER, TAILS["unirl"]),
    Loop("unirl", "FlowDPPO, flow", _unirl("FlowSDEStrategy"), _EULER, TAILS["unirl, dppo"]),
)


class Rollout:
    """Latents, log-probs and means of the trained steps, made by whatever step is in place."""

    def __init__(self, loop: Loop, network: nn.Module) -> None:
        torch.manual_seed(7)
        self.loop, self.schedule = loop, loop.schedule()
        x = torch.randn(BATCH, *loop.latent)
        self.advantages = torch.randn(BATCH)
        # UniPC's first step, from sigma 0.9999, is so wide that nothing after it is an image
        self.first = 1 if "Wan" in loop.name or "UniPC" in loop.name else 0
        self.latents: dict[int, Tensor] = {self.first: x}
        self.taken: dict[int, Taken] = {}
        with torch.no_grad():
            for k in range(self.first, TRAINED):
                taken = loop.step(self.schedule, network(x, k), x, None, k)
                self.taken[k], x = taken, taken.prev_sample
                self.latents[k + 1] = x

    def scene(self, network: nn.Module, update: int) -> Scene:
        """What a script has in scope before its loss, at one update."""
        k = self.first + update % (TRAINED - self.first)
        x, y, before = self.latents[k], self.latents[k + 1], self.taken[k]
        v = network(x, k)
        now = self.loop.step(self.schedule, v, x, y, k)
        call = {"schedule": self.schedule, "k": k, "model_output": v, "sample": x, "prev_sample": y}
        call["sde_type"] = self.loop.sde_type
        return Scene(
            now.log_prob, before.log_prob, now.mean, before.mean, now.std_dev_t, now.sqrt_dt,
            self.advantages, call,
        )  # fmt: skip


class Trained(NamedTuple):
    """Of one run: the weights, and the first update's loss."""

    weights: Tensor
    moved: float  # the largest change of a weight
    loss: float


def train(rollout: Rollout, start: nn.Module, loss_of: Callable[[Scene], Tensor]) -> Trained:
    """AdamW at 3e-4 and gradient norm 1, as the scripts have it."""
    network = copy.deepcopy(start)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4)
    first = 0.0
    for update in range(UPDATES):
        loss = loss_of(rollout.scene(network, update))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        first = first if update else float(loss)
    weights, before = (
        torch.cat([p.detach().flatten() for p in n.parameters()]) for n in (network, start)
    )
    return Trained(weights, float((weights - before).abs().max()), first)


def gradient(rollout: Rollout, network: nn.Module, loss_of: Callable[[Scene], Tensor]) -> Tensor:
    """Of one update, off policy."""
    loss = loss_of(rollout.scene(network, 2))
    grads = torch.autograd.grad(loss, list(network.parameters()))
    return torch.cat([loss.detach().reshape(1), *(g.flatten() for g in grads)])


def source(root: Path, tail: Tail) -> Callable[[Scene], Tensor]:
    """The script's own lines as a function of the scene."""
    return lambda scene: tail.original(root, scene)
