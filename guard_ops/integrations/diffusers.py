"""A stochastic flow-matching scheduler for diffusers, on fused ops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from ..schedule import SdeKind, SdeSchedule
from . import steps
from .flow_grpo import draw_noise


@dataclass
class FlowMatchSdeSchedulerOutput(BaseOutput):  # type: ignore[misc]
    """What :meth:`FlowMatchSdeScheduler.step` returns."""

    prev_sample: Tensor  # [B, *latent], dtype of the model output
    log_prob: Tensor | None = None  # [B] float32; None for a deterministic step
    prev_sample_mean: Tensor | None = None  # [B, *latent] float32


class FlowMatchSdeScheduler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """Flow matching's reverse SDE instead of its ODE: ``y ~ N(a x + b v, s^2)``.

    Everything about sigmas and timesteps is :class:`FlowMatchEulerDiscreteScheduler`'s, whose
    configurations load (``FlowMatchSdeScheduler.from_config(pipe.scheduler.config)``) and whose
    pipelines run. :attr:`schedule` has the coefficients that :func:`guard_ops.guard_loss` takes.

    Args:
        noise_level: eta of :class:`guard_ops.SdeSchedule`; 0 is the ODE. ``scheduler.noise_level``
            may be set at any time (0 to evaluate).
        sde_kind: "flow_sde", "dance_sde", "wan_sde" or "cps".
        others: FlowMatchEulerDiscreteScheduler's.

    Pipelines that do not hand their generator to ``step`` (FLUX's and SD3's do not) draw the steps'
    noise from ``scheduler.generator``, if that is set, else from the global one.
    """

    @register_to_config  # type: ignore[untyped-decorator, unused-ignore]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
        noise_level: float = 0.7,
        sde_kind: SdeKind = "flow_sde",
    ) -> None:
        if invert_sigmas or stochastic_sampling:
            name = "invert_sigmas" if invert_sigmas else "stochastic_sampling"
            raise ValueError(f"`{name}` is True; this SDE has decreasing sigmas and its own noise")
        FlowMatchEulerDiscreteScheduler.__init__(
            self,
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
        )
        self.noise_level = noise_level
        self.sde_kind: SdeKind = sde_kind
        self.generator: torch.Generator | list[torch.Generator] | None = None

    @classmethod
    def from_config(cls, config: Any = None, **kwargs: Any) -> Any:
        """A scheduler of this class from any flow scheduler's configuration.

        Wan's pipelines keep their shift as UniPC's ``flow_shift``, which is taken over as
        ``shift``.
        """
        shift = None if config is None else config.get("flow_shift")
        if shift is not None and "shift" not in config:
            kwargs = {"shift": shift, **kwargs}
        return super().from_config(config, **kwargs)

    @property
    def schedule(self) -> SdeSchedule:
        """The coefficients of the current timesteps, on their device."""
        return steps.schedule_of(self.sigmas, self.noise_level, self.sde_kind, self.sigmas.device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Any = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
        prev_sample: Tensor | None = None,
    ) -> FlowMatchSdeSchedulerOutput | tuple[Tensor | None, ...]:
        """One step of the SDE, or, with ``prev_sample``, the log-prob of a step that was taken.

        Args:
            model_output: velocity, [B, *latent].
            timestep: one of ``self.timesteps`` (float or []), which advances the scheduler as
                diffusers' own do; or [B], a timestep for each sample, which does not.
            sample: x, [B, *latent].
            s_churn, s_tmin, s_tmax, s_noise: have no effect; pipelines may pass them.
            prev_sample: y; the log-prob and the mean then carry gradients to ``model_output``.

        Raises:
            ValueError: ``timestep`` is an integer or is not in the schedule, or
                ``per_token_timesteps`` is given.
        """
        if isinstance(timestep, int) or (
            isinstance(timestep, Tensor) and not timestep.is_floating_point()
        ):
            raise ValueError(
                "`timestep` is an integer; it needs one of `scheduler.timesteps`, not its index"
            )
        if per_token_timesteps is not None:
            raise ValueError("`per_token_timesteps` is not supported by this SDE")
        batched = isinstance(timestep, Tensor) and timestep.ndim > 0
        if batched:
            index: Any = steps.index_for_timestep(self.timesteps, torch.as_tensor(timestep))
        else:
            if self.step_index is None:
                self._init_step_index(timestep)
            index = self.step_index
        coeffs = steps.coefficients(
            self.sigmas, index, self.noise_level, self.sde_kind, len(sample), sample.device
        )
        deterministic = self.noise_level == 0 or bool(coeffs.deterministic)
        done = steps.sde_step(
            model_output,
            sample.float(),
            coeffs,
            None if prev_sample is None else prev_sample.float(),
            (lambda: torch.zeros_like(sample, dtype=torch.float32))
            if deterministic
            else (lambda: draw_noise(model_output, generator or self.generator)),
            with_log_prob=not deterministic,
            store_dtype=model_output.dtype,
        )
        if not batched:
            self._step_index += 1
        stored = done.prev_sample.to(model_output.dtype)
        if not return_dict:
            return (stored, done.log_prob, done.mean)
        return FlowMatchSdeSchedulerOutput(stored, done.log_prob, done.mean)
