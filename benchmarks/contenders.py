"""Makes what races: a workload's tensors, and calls on them that give a loss and its gradient."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import guard_ops as go
from guard_ops.transitions import FORMS

from . import baselines
from .measure import Call
from .workloads import Workload

SIGMA_SHIFT = 3.0
TOTAL_STEPS = 20
NOISE_LEVEL = 0.7
CHAINS: dict[str, Callable[..., Tensor]] = {
    "article": baselines.article_chain,
    "paper": baselines.paper_chain,
    "flow_grpo": baselines.flow_grpo_chain,
    "dance_grpo": baselines.flow_grpo_chain,  # the same loss; its SDE step is of kind dance_sde
}


@dataclass(frozen=True)
class Inputs:
    """A rollout, and the velocity of the policy as it is now; latents are [K, B, *latent]."""

    model_output: Tensor  # requires grad
    old_model_output: Tensor
    sample: Tensor
    prev_sample: Tensor
    noise: Tensor
    seed: Tensor  # [K, B, 2]: the seeded form's noise
    old_mean: Tensor  # float32, as sde_step returns it
    old_log_prob: Tensor  # [K, B] float32, as a trainer stores it
    advantages: Tensor  # [B]
    coeffs: go.StepCoefficients  # [K]
    sigmas: Tensor  # [TOTAL_STEPS + 1]
    index: Tensor  # [K * B]: the transitions' steps

    @property
    def step(self) -> baselines.Step:
        """The steps of the rollout as a chain's scheduler gives them."""
        latent_dims = self.sample.ndim - 2
        return baselines.scheduler_step(self.sigmas, self.index, NOISE_LEVEL, latent_dims)

    def form(self, form: str) -> dict[str, Any]:
        """The operands that say what the behaviour policy was, and the coefficients."""
        return {name: getattr(self, name) for name in FORMS[form]} | {"coeffs": self.coeffs}


def make_inputs(
    workload: Workload,
    dtype: torch.dtype = torch.float32,
    drift: float = 1e-2,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Inputs:
    """A rollout in ``dtype`` whose policy has since moved by ``drift``, in units of velocity.

    ``old_mean`` and ``old_log_prob`` are float32 and those of the rounded tensors, as a trainer
    computes them.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def randn() -> Tensor:
        return torch.randn(workload.shape, generator=generator, device=device)

    kind: Any = workload.kind
    line = torch.linspace(1, 0, TOTAL_STEPS + 1, dtype=torch.float64)
    sigmas = SIGMA_SHIFT * line / (1 + (SIGMA_SHIFT - 1) * line)
    steps = torch.arange(workload.steps) + (TOTAL_STEPS - workload.steps + 1) // 2  # the middle
    coeffs = go.SdeSchedule(sigmas, NOISE_LEVEL, kind)[steps].to(device)
    old_model_output, sample, noise = (randn().to(dtype) for _ in range(3))
    model_output = (old_model_output.float() + drift * randn()).to(dtype)
    rollout = go.sde_step(old_model_output, sample, coeffs, noise=noise)
    prev_sample, old_mean = rollout.prev_sample.to(dtype), rollout.mean
    index = steps.repeat_interleave(workload.batch).to(device)
    sigmas = sigmas.float().to(device)
    step = baselines.scheduler_step(sigmas, index, NOISE_LEVEL, len(workload.latent))
    old_log_prob = baselines.stored_log_prob(
        prev_sample.flatten(0, 1), old_mean.flatten(0, 1), step, workload.kind
    )
    return Inputs(
        model_output.requires_grad_(),
        old_model_output,
        sample,
        prev_sample,
        noise,
        go.philox_seed(seed, (workload.steps, workload.batch), device),
        old_mean,
        old_log_prob.view(workload.shape[:2]),
        torch.randn(workload.batch, generator=generator, device=device),
        coeffs,
        sigmas,
        index,
    )


def on(backend: str | None) -> AbstractContextManager[None]:
    """``guard_ops.use_backend(backend)``; None leaves the backend that is in use."""
    return nullcontext() if backend is None else go.use_backend(backend)


def config_of(objective: str, inputs: Inputs, **settings: Any) -> go.GuardConfig:
    """``GuardConfig.<objective>()``; without the article's balance if there is one step."""
    config: go.GuardConfig = getattr(go.GuardConfig, objective)(**settings)
    if config.balance == "inverse_ratio" and len(inputs.model_output) == 1:
        return dataclasses.replace(config, balance="none")
    return config


def ours(inputs: Inputs, form: str, objective: str, backend: str | None = None) -> Call:
    """``guard_loss`` in one of the forms under ``GuardConfig.<objective>()``, and its backward."""
    config = config_of(objective, inputs)
    operands, v = inputs.form(form), inputs.model_output

    def call() -> None:
        v.grad = None
        with on(backend):
            out = go.guard_loss(v, advantages=inputs.advantages, config=config, **operands)
            out.loss.backward()

    return call


def loss_and_grad(inputs: Inputs, form: str, objective: str) -> Call:
    """``guard_loss_and_grad``: the same numbers as :func:`ours`, without autograd."""
    config = config_of(objective, inputs)
    operands, v = inputs.form(form), inputs.model_output
    return lambda: go.guard_loss_and_grad(
        v, advantages=inputs.advantages, config=config, **operands
    )


def chain(
    inputs: Inputs,
    objective: str,
    *,
    compiled: bool | str = False,
    recompute: bool = False,
    kind: str = "flow_sde",
) -> Call:
    """A plain-PyTorch chain of :mod:`benchmarks.baselines`, and its backward.

    Args:
        objective: a key of ``CHAINS``.
        compiled: whether to use ``torch.compile`` (True, or its mode); the first calls compile.
        recompute: whether to compute the rollout's log-prob from ``old_mean``, which is all that
            the mean form is given. By default it is given, as public trainers store it.
        kind: the SDE that ``inputs`` were rolled out with.
    """
    v, step = inputs.model_output, inputs.step
    old = inputs.old_mean if recompute else inputs.old_log_prob
    run = _loss_of_chain(objective, compiled, recompute, kind)

    def call() -> None:
        v.grad = None
        run(
            v, inputs.sample, inputs.prev_sample, old, inputs.old_mean, inputs.advantages, *step[:3]
        ).backward()

    return call


@functools.cache
def _loss_of_chain(
    objective: str, compiled: bool | str, recompute: bool, kind: str
) -> Callable[..., Tensor]:
    """A chain as a function of tensors alone, so that it is compiled once for all rollouts."""
    loss_of = CHAINS[objective]

    def forward(
        v: Tensor,
        sample: Tensor,
        prev_sample: Tensor,
        old: Tensor,
        old_mean: Tensor,
        advantages: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        sigma_max: Tensor,
    ) -> Tensor:
        step = baselines.Step(sigma, sigma_next, sigma_max, NOISE_LEVEL)
        if recompute:
            log_prob = baselines.stored_log_prob(
                prev_sample.flatten(0, 1), old.flatten(0, 1), step, kind
            )
            old = log_prob.view(v.shape[:2])
        return loss_of(
            v,
            sample=sample,
            prev_sample=prev_sample,
            old_log_prob=old,
            advantages=advantages,
            step=step,
            kind=kind,
            **({"old_mean": old_mean} if objective == "paper" else {}),
        )

    if not compiled:
        return forward
    mode = compiled if isinstance(compiled, str) else None
    return torch.compile(forward, mode=mode, dynamic=False)


def memory_copy(nbytes: int, device: torch.device | str = "cpu") -> Call:
    """The yardstick: a copy that moves ``nbytes``, half of them read and half written."""
    source = torch.zeros(nbytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    source.fill_(1)  # puts a page of its own behind every address
    return lambda: target.copy_(source)
