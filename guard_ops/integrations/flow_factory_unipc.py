"""Flow-Factory's ``UniPCMultistepSDEScheduler``: its step, which Wan's models are trained with."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from . import flow_factory


def step(
    self: Any,
    noise_pred: Tensor,
    timestep: float | Tensor,
    latents: Tensor,
    next_latents: Tensor | None = None,
    timestep_next: float | Tensor | None = None,
    generator: Any = None,
    noise_level: float | Tensor | None = None,
    compute_log_prob: bool = True,
    return_dict: bool = True,
    return_kwargs: list[str] | tuple[str, ...] = flow_factory._RETURNS,
    dynamics_type: str | None = None,
    sigma_max: float | None = None,
) -> Any:
    """``UniPCMultistepSDEScheduler.step`` on fused ops: the same steps as the Euler scheduler's.

    Two things are its own: in evaluation it takes the multistep UniPC step of diffusers, and
    without ``return_dict`` the order is next_latents, log_prob, next_latents_mean, std_dev_t, dt.
    Arguments and errors are those of :func:`guard_ops.integrations.flow_factory.step`.
    """
    own = next(c for c in type(self).__mro__ if c.__name__ == "UniPCMultistepSDEScheduler")
    module = importlib.import_module(own.__module__)
    if self.is_eval:
        at = timestep if timestep_next is not None else flow_factory.timestep_of(self, timestep)
        diffusers: Any = super(own, self)
        ahead = diffusers.step(noise_pred, at, latents, return_dict=False)[0]
        return module.UniPCMultistepSDESchedulerOutput(next_latents=ahead)
    values = flow_factory.step(
        self,
        noise_pred,
        timestep,
        latents,
        next_latents,
        timestep_next,
        generator,
        noise_level,
        compute_log_prob,
        False,
        (),
        dynamics_type,
        sigma_max,
    )
    order = ("next_latents", "next_latents_mean", "noise_pred", "log_prob", "std_dev_t", "dt")
    found = dict(zip(order, values, strict=True))
    if not return_dict:
        tupled = ("next_latents", "log_prob", "next_latents_mean", "std_dev_t", "dt")
        return tuple(found[name] for name in tupled)
    return module.UniPCMultistepSDESchedulerOutput.from_dict(
        {name: found[name] for name in return_kwargs if name in found}
    )
