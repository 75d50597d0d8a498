"""The functions that ``apply`` replaces, restated with the real ones' signatures and quirks.

Every call makes new ones, as an import or a reload does. Their arithmetic is that of
:mod:`benchmarks.baselines`; which random numbers they draw, the order of what they return, their
parameters' names and order, and what they assert is the real code's.
"""

from __future__ import annotations

import math
import sys
import types
from dataclasses import dataclass

import torch

from benchmarks import baselines

SDE = {"sde": "flow_sde", "Flow-SDE": "flow_sde", "Dance-SDE": "dance_sde", "CPS": "cps"}


def module(monkeypatch, name, **members):
    """An importable module, with its packages, for the length of a test."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ".".join(parts[:i])
        if path not in sys.modules:
            new = types.ModuleType(path)
            new.__path__ = []
            monkeypatch.setitem(sys.modules, path, new)
            if i > 1:
                monkeypatch.setattr(
                    sys.modules[".".join(parts[: i - 1])], parts[i - 1], new, raising=False
                )
    for key, value in members.items():
        if isinstance(value, types.FunctionType | type) and value.__module__ == __name__:
            value.__module__ = name
        setattr(sys.modules[name], key, value)
    return sys.modules[name]


def _taken(kind, v, x, y, numbers, generator, storage=torch.float32):
    """The next sample, given or drawn, and what belongs to it."""
    step = baselines.SDE_STEPS[kind]
    v, x = v.float(), x.float()
    if y is None:
        from diffusers.utils.torch_utils import randn_tensor

        draw = randn_tensor(v.shape, generator=generator, dtype=v.dtype)
        out = step(v, x, x, numbers)
        y = (out.prev_sample_mean + out.s * draw).to(storage)
    y = y.float()
    return y, step(v, x, y, numbers)


def _numbers(scheduler, timestep, noise_level, sample):
    index = torch.tensor([scheduler.index_for_timestep(t) for t in timestep])
    return baselines.scheduler_step(scheduler.sigmas, index, noise_level, sample.ndim - 1)


def flow_grpo_step(scale=1.0):
    """``scale`` is a fork's other standard deviation."""

    def sde_step_with_logprob(
        self, model_output, timestep, sample, noise_level=0.7, prev_sample=None, generator=None,
        sde_type="sde", return_sqrt_dt=False,
    ):  # fmt: skip
        numbers = _numbers(self, timestep, scale * noise_level, sample)
        kind = SDE.get(sde_type, sde_type)
        y, out = _taken(kind, model_output, sample, prev_sample, numbers, generator)
        std = out.s if kind == "cps" else out.std_dev_t
        found = (y, out.log_prob, out.prev_sample_mean, std)
        return (*found, out.sqrt_dt) if return_sqrt_dt else found

    return sde_step_with_logprob


def wan_step():
    def sde_step_with_logprob(
        self, model_output, timestep, sample, prev_sample=None, generator=None, determistic=False,
        return_pixel_log_prob=False, return_dt_and_std_dev_t=False,
    ):  # fmt: skip
        v, x = model_output.float(), sample.float()
        at = _numbers(self, timestep, 1.0, sample)
        dt, std = at.sigma_next - at.sigma, at.sigma_max * at.sigma
        half = std**2 / (2 * at.sigma)
        mean = x * (1 + half * dt) + v * (1 + half * (1 - at.sigma)) * dt
        root = torch.sqrt(-dt)
        if prev_sample is None:
            from diffusers.utils.torch_utils import randn_tensor

            prev_sample = mean + std * root * randn_tensor(v.shape, generator=generator)
        elif generator is not None:
            raise ValueError("both")
        prev_sample = x + dt * v if determistic else prev_sample.float()
        log_prob = baselines._gaussian_log_prob(prev_sample, mean, std * root)
        stds = (std, root) if return_dt_and_std_dev_t else (std * root,)
        return prev_sample, log_prob, mean, *stds

    return sde_step_with_logprob


def bagel():
    class Bagel:
        def _sde_step_with_logprob(
            self, model_output, timestep, prev_timestep, d_timestep, sample, prev_sample=None,
            generator=None, sigma_max=None, noise_level=0.8, sde_type="sde",
        ):  # fmt: skip
            following = timestep + d_timestep if sde_type == "sde" else prev_timestep
            numbers = baselines.Step(timestep, following, sigma_max, noise_level)
            y, out = _taken(SDE.get(sde_type, "cps"), model_output, sample, prev_sample, numbers,
                            generator)  # fmt: skip
            square = (y.detach() - out.prev_sample_mean) ** 2
            log_prob = -(square / (2 * out.s**2) if sde_type == "sde" else square).mean()
            std = out.std_dev_t if sde_type == "sde" else out.s
            return y, log_prob, out.prev_sample_mean, std

    return Bagel


def flux_step():
    def flux_step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver):
        at = baselines.Step(sigmas[index], sigmas[index + 1], sigmas[1], eta)
        v, dt = model_output, at.sigma_next - at.sigma
        mean = latents + dt * v
        if sde_solver:
            mean = baselines.dance_sde_step(v, latents, latents, at).prev_sample_mean
        s = eta * (-dt).sqrt()
        predicted = latents - at.sigma * v
        if not grpo:
            return mean, predicted
        if prev_sample is None:
            prev_sample = mean + torch.randn_like(mean) * s
        return prev_sample, predicted, baselines._gaussian_log_prob(prev_sample, mean, s)

    return flux_step


def verl_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    class FlowMatchSDEDiscreteScheduler(FlowMatchEulerDiscreteScheduler):
        def sample_previous_step(
            self, sample, model_output, timestep=None, generator=None, per_token_timesteps=None,
            noise_level=0.7, prev_sample=None, sde_type="sde", return_logprobs=True,
            return_sqrt_dt=False, include_logprob_normalizer=True,
        ):  # fmt: skip
            assert sde_type in ["sde", "cps", "dance_sde"]
            assert sample.dtype == model_output.dtype == torch.float32
            at = baselines.Step(self.sigmas[self.step_index or 0],
                                self.sigmas[(self.step_index or 0) + 1], self.sigmas[1],
                                noise_level)  # fmt: skip
            if timestep is not None:
                at = _numbers(self, timestep, noise_level, sample)
            kind = SDE.get(sde_type, sde_type)
            y, out = _taken(kind, model_output, sample, prev_sample, at, generator)
            log_prob = out.log_prob if return_logprobs else None
            if return_logprobs and kind != "cps" and not include_logprob_normalizer:
                square = (y.detach() - out.prev_sample_mean) ** 2 / (2 * out.s**2)
                log_prob = -square.flatten(1).mean(1)
            std = out.std_dev_t if kind == "flow_sde" else out.s
            found = (y, log_prob, out.prev_sample_mean, std)
            root = out.sqrt_dt.flatten().expand(len(sample)).clone()
            return (*found, root) if return_sqrt_dt else found

    return FlowMatchSDEDiscreteScheduler


@dataclass
class SDESchedulerOutput:
    """What both of Flow-Factory's schedulers return."""

    next_latents: object = None
    next_latents_mean: object = None
    std_dev_t: object = None
    dt: object = None
    log_prob: object = None
    noise_pred: object = None

    @classmethod
    def from_dict(cls, values):
        return cls(**values)


def flow_factory_schedulers():
    """Flow-Factory's two schedulers, and the class of what UniPC's returns."""
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    class UniPCMultistepSDESchedulerOutput(SDESchedulerOutput):
        pass

    def each(base, result, order):
        class Scheduler(base):
            def __init__(self, noise_level=0.7, dynamics_type="Flow-SDE", **kwargs):
                super().__init__(**kwargs)
                self.noise_level, self.dynamics_type = noise_level, dynamics_type
                self.is_eval = False

            def eval(self):
                self.is_eval = True

            @property
            def current_sde_steps(self):
                return torch.arange(len(self.timesteps) - 1)

            def step(
                self, noise_pred, timestep, latents, next_latents=None, timestep_next=None,
                generator=None, noise_level=None, compute_log_prob=True, return_dict=True,
                return_kwargs=["next_latents", "next_latents_mean", "std_dev_t", "dt",  # noqa: B006
                               "log_prob", "noise_pred"],
                dynamics_type=None, sigma_max=None,
            ):  # fmt: skip
                if timestep_next is None:
                    numbers = [timestep]  # an integer is a step's number
                    if isinstance(timestep, torch.Tensor) and timestep.is_floating_point():
                        numbers = [self.index_for_timestep(t) for t in timestep.reshape(-1)]
                    timestep = self.timesteps[numbers]
                    now, then = self.sigmas[numbers], self.sigmas[[k + 1 for k in numbers]]
                else:
                    now, then = timestep / 1000, timestep_next / 1000
                if self.is_eval and base is UniPCMultistepScheduler:
                    ahead = super().step(noise_pred, timestep, latents, return_dict=False)[0]
                    return result(next_latents=ahead)
                kind = dynamics_type or self.dynamics_type
                if kind == "ODE" or self.is_eval:
                    noise_level = 0.0
                elif noise_level is None:
                    at = [int((self.sigmas == sigma).int().argmax()) for sigma in now.reshape(-1)]
                    active = torch.isin(torch.tensor(at), self.current_sde_steps)
                    noise_level = torch.where(active, self.noise_level, 0.0)

                def row(x):
                    x = torch.as_tensor(x, dtype=torch.float32).reshape(-1)
                    return x.expand(len(latents)).view(-1, *[1] * (latents.ndim - 1))

                at = baselines.Step(row(now), row(then), torch.tensor(float(self.sigmas[1])), 1.0)
                dt, level = at.sigma_next - at.sigma, row(noise_level)
                v = noise_pred.float()
                if kind == "ODE":
                    mean = latents.float() + dt * v
                    y = mean if next_latents is None else next_latents.float()
                    log_prob, std = torch.zeros(len(latents)), torch.zeros_like(dt)
                else:
                    sde = SDE[kind]
                    if sde == "cps":
                        y, out = _cps(v, latents, next_latents, at, level, generator)
                    else:
                        at = at._replace(noise_level=level)
                        y, out = _taken(sde, v, latents, next_latents, at, generator, latents.dtype)
                    mean, log_prob = out.prev_sample_mean, out.log_prob
                    std = level if sde == "dance_sde" else out.std_dev_t
                found = {
                    "next_latents": y, "next_latents_mean": mean, "noise_pred": v, "dt": dt,
                    "log_prob": log_prob if compute_log_prob else None, "std_dev_t": std,
                }  # fmt: skip
                if not return_dict:
                    return tuple(found[name] for name in order)
                return result.from_dict({name: found[name] for name in return_kwargs})

        return Scheduler

    euler = each(
        FlowMatchEulerDiscreteScheduler,
        SDESchedulerOutput,
        ("next_latents", "next_latents_mean", "noise_pred", "log_prob", "std_dev_t", "dt"),
    )
    unipc = each(
        UniPCMultistepScheduler,
        UniPCMultistepSDESchedulerOutput,
        ("next_latents", "log_prob", "next_latents_mean", "std_dev_t", "dt"),
    )
    euler.__name__ = "FlowMatchEulerDiscreteSDEScheduler"
    unipc.__name__ = "UniPCMultistepSDEScheduler"
    return euler, unipc, UniPCMultistepSDESchedulerOutput


def _cps(v, latents, next_latents, at, level, generator):
    """CPS with a noise level for each sample: one sample at a time, drawn together."""
    from diffusers.utils.torch_utils import randn_tensor

    if next_latents is None:
        draw = randn_tensor(v.shape, generator=generator, dtype=v.dtype)
    outs, ys = [], []
    for i in range(len(v)):
        one = baselines.Step(at.sigma[i], at.sigma_next[i], at.sigma_max, float(level[i]))
        args = (v[i : i + 1], latents[i : i + 1].float())
        out = baselines.cps_step(*args, args[1], one)
        y = (
            (out.prev_sample_mean + out.s * draw[i : i + 1]).to(latents.dtype)
            if (next_latents is None)
            else next_latents[i : i + 1]
        )
        ys.append(y.float())
        outs.append(baselines.cps_step(*args, y.float(), one))
    joined = [torch.cat([o[k] for o in outs]) for k in range(2)]
    s = torch.stack([o.s for o in outs])
    return torch.cat(ys), baselines.StepOutput(*joined, s, s, s)


def unirl_strategies():
    """UniRL's strategies by name; ``denoise`` is their base's, the ODE solver's as well."""

    class StepStrategy:
        canonical_name = "dpm2"

        def denoise(
            self, noise_pred, sample, sigma, sigma_next, *, eta=1.0, prev_sample=None,
            sigma_max=0.99, step_index=0,
        ):  # fmt: skip
            dtype, v, x = sample.dtype, noise_pred.float(), sample.float()
            shape = (-1, *[1] * (x.ndim - 1))
            sigma, sigma_next = (t.float().reshape(shape) for t in (sigma, sigma_next))
            mean, s = self.step(v, x, sigma, sigma_next, eta, sigma_max)
            if s is None:
                return mean, None, None
            y = mean + s * torch.randn_like(v) if prev_sample is None else prev_sample.float()
            if eta < 1e-7:
                return y, None, mean
            y = y.to(dtype).float()
            log_prob = -((y.detach() - mean) ** 2)
            if self.canonical_name != "cps":
                log_prob = log_prob / (2 * s**2) - torch.log(s) - 0.5 * math.log(2 * math.pi)
            return y, log_prob.flatten(1).mean(1), mean

    class DPM2Strategy(StepStrategy):
        def step(self, v, x, sigma, following, eta, sigma_max):
            return x + (following - sigma) * v, None

    class FlowSDEStrategy(StepStrategy):
        canonical_name = "flow"

        def step(self, v, x, sigma, following, eta, sigma_max):
            dt, std = following - sigma, self.std(sigma, eta, sigma_max)
            half = std**2 / (2 * sigma)
            return x * (1 + half * dt) + v * (1 + half * (1 - sigma)) * dt, std * torch.sqrt(-dt)

        def std(self, sigma, eta, sigma_max):
            return torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))) * eta

    class DanceSDEStrategy(StepStrategy):
        canonical_name = "dance"
        step = FlowSDEStrategy.step

        def std(self, sigma, eta, sigma_max):
            return torch.full_like(sigma, eta)

    class CPSSDEStrategy(StepStrategy):
        canonical_name = "cps"

        def step(self, v, x, sigma, following, eta, sigma_max):
            s = following * math.sin(eta * math.pi / 2)
            kept = torch.sqrt(following**2 - s**2)
            return (x - sigma * v) * (1 - following) + (x + v * (1 - sigma)) * kept, s

    found = (StepStrategy, DPM2Strategy, FlowSDEStrategy, DanceSDEStrategy, CPSSDEStrategy)
    return {each.__name__: each for each in found}


def flowdppo_loss():
    def _flowdppo_kl_adv_loss(
        *, new_logp, old_logp, new_means, old_means, advantages, sigma_t, kl_mask_threshold
    ):
        log_diff = new_logp - old_logp
        ratio = torch.exp(log_diff)
        kl = ((new_means - old_means) ** 2 / (2 * sigma_t**2)).flatten(2).mean(2)
        far = kl >= kl_mask_threshold
        up, down = far & (ratio > 1) & (advantages > 0), far & (ratio < 1) & (advantages < 0)
        removed = up | down
        metrics = {
            "ratio_mean": ratio.mean(),
            "ratio_std": ratio.std() if ratio.numel() > 1 else torch.zeros(()),
            "ratio_min": ratio.min(),
            "ratio_max": ratio.max(),
            "approx_kl": (0.5 * log_diff**2).mean(),
            "kl_new_old_mean": kl.mean(),
            "kl_new_old_max": kl.max(),
            "kl_mask_fraction": far.float().mean(),
            "pos_rm_fraction": up.float().mean(),
            "neg_rm_fraction": down.float().mean(),
            "masked_fraction": removed.float().mean(),
            "unmasked_fraction": (~removed).float().mean(),
        }
        losses = torch.where(removed, torch.zeros(()), -advantages * ratio)
        return losses, {name: value.detach() for name, value in metrics.items()}

    return _flowdppo_kl_adv_loss
