"""One SDE step the way trainers' functions take and return it, on any schedule of sigmas.

The frameworks' files share this. Steps are looked up on the device (the originals call
``nonzero().item()`` once per sample), and the step itself runs on the fused ops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import ops
from ..checks import check_choice
from ..schedule import SDE_RULES, SdeKind, SdeSchedule, StepCoefficients, coefficient_table


class Step(NamedTuple):
    """What a framework's step returns, and the coefficients it was made with."""

    prev_sample: Tensor  # [B, *latent] float32
    log_prob: Tensor | None  # [B] float32, mean over the latent
    mean: Tensor  # [B, *latent] float32
    coeffs: StepCoefficients  # [1, B]


# sigmas on an accelerator -> {(version, noise level, kind, device): schedule}
_schedules: Any = WeakIdKeyDictionary()


def schedule_of(sigmas: Tensor, noise_level: float, kind: SdeKind, device: Any) -> SdeSchedule:
    """The schedule of a scheduler's ``sigmas`` on ``device``, made once.

    Sigmas on the CPU, where schedulers keep them, are known by their values. Those on an
    accelerator, of which a look would make the host wait, are known by their version, which an
    edit of ``sigmas.data`` does not change, nor any edit of an inference tensor, which has none.
    """
    level, where = float(noise_level), torch.device(device)
    if _on_host(sigmas):
        return _schedule(tuple(sigmas.tolist()), level, kind, where)
    known = _schedules.setdefault(sigmas, {})
    key = (None if sigmas.is_inference() else sigmas._version, level, kind, where)
    if key not in known:
        known[key] = SdeSchedule(sigmas, level, kind, where)
    found: SdeSchedule = known[key]
    return found


@functools.lru_cache(maxsize=64)
def _schedule(
    sigmas: tuple[float, ...], noise_level: float, kind: SdeKind, device: torch.device
) -> SdeSchedule:
    return SdeSchedule(sigmas, noise_level, kind, device)


def on_device(numbers: Tensor, device: torch.device) -> Tensor:
    """A scheduler's ``numbers`` on ``device``; those on the CPU are copied there once.

    A copy from the CPU makes the host wait, so the copies are kept, known by their values.
    """
    if device.type == "cpu" or not _on_host(numbers):
        return numbers.to(device)
    copied = _copied(tuple(numbers.reshape(-1).tolist()), numbers.dtype, device)
    return copied.reshape(numbers.shape)


@functools.lru_cache(maxsize=256)
def _copied(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=dtype, device=device)


def coefficients_on(coeffs: StepCoefficients, device: torch.device) -> StepCoefficients:
    """``coeffs`` on ``device``; those on the CPU, which are kept, are copied there once."""
    if coeffs.device == device:
        return coeffs
    if coeffs.device.type != "cpu" or torch.compiler.is_compiling():
        return coeffs.to(device)
    return _moved(coeffs, device)


@functools.lru_cache(maxsize=256)
def _moved(coeffs: StepCoefficients, device: torch.device) -> StepCoefficients:
    return coeffs.to(device)


Index = int | tuple[int, ...] | Tensor  # of one step, or of each sample's


def index_for_timestep(timesteps: Tensor, timestep: Tensor) -> tuple[int, ...] | Tensor:
    """The step of each ``timestep`` [B] (or []) in a scheduler's ``timesteps`` [N].

    On the CPU, which is where diffusers keeps schedules, it is looked up by the host, which then
    also knows the coefficients; on an accelerator by the device, so that nothing waits: [B].

    Raises:
        ValueError: a timestep on the CPU is not in the schedule. On an accelerator an assertion on
            the device fails instead.
    """
    if _on_host(timesteps) and _on_host(timestep):
        return _index(numbers(timesteps), numbers(timestep))
    where = _where(timesteps, timestep)
    wanted_there = on_device(timestep, where).reshape(-1, 1)
    match = on_device(timesteps, where).unsqueeze(0) == wanted_there
    torch._assert_async(match.any(1).all(), "`timestep` is not one of the scheduler's")
    return match.int().argmax(1)


@functools.lru_cache(maxsize=256)
def _index(timesteps: tuple[float, ...], wanted: tuple[float, ...]) -> tuple[int, ...]:
    known: dict[float, int] = {}
    for k, value in enumerate(timesteps):
        known.setdefault(value, k)
    for value in wanted:
        if value not in known:
            raise ValueError(
                f"`timestep` has {value}, which is not one of the scheduler's "
                f"{len(timesteps)} timesteps"
            )
    return tuple([known[value] for value in wanted])


def is_one_step(index: Index, batch: int) -> bool:
    """Whether all samples are at one step, as far as the host can tell without waiting."""
    return (
        batch == 1 or isinstance(index, int) or (isinstance(index, tuple) and len(set(index)) == 1)
    )


def _each(index: int | tuple[int, ...]) -> tuple[int, ...]:
    return (index,) if isinstance(index, int) else index


def _where(*each: Any) -> torch.device:
    """The accelerator that one of the tensors is on, from which nothing is to be read; or the CPU.

    What is no tensor is anywhere.
    """
    devices = [x.device for x in each if isinstance(x, Tensor)]
    return next((d for d in devices if d.type != "cpu"), devices[0])


def numbers(x: Tensor) -> tuple[float, ...]:
    """Those of a tensor that the host has, flat."""
    return tuple((x if x.ndim == 1 else x.reshape(-1)).tolist())


def known(x: float | Tensor) -> bool:
    """Whether the host has the numbers of ``x`` without waiting for a device."""
    return not isinstance(x, Tensor) or _on_host(x)


def _on_host(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def coefficients(
    sigmas: Tensor,  # [N + 1]
    index: Index,
    noise_level: float | Tensor,
    kind: SdeKind,
    batch: int,
    device: torch.device,
) -> StepCoefficients:
    """[1, B] coefficients of steps of a schedule; a tensor ``noise_level`` is per sample, [B].

    Where the density's constants are dropped (cps), the last step, of which ``s`` is 0, has a
    log-prob like the others, and a noise level above 1 has the sine's value, as in the originals.
    """
    check_choice("kind", kind, tuple(SDE_RULES))
    rule = SDE_RULES[kind]
    known = not isinstance(noise_level, Tensor) and 0 <= noise_level <= rule.largest_noise_level
    if not known or torch.compiler.is_compiling():
        where = _where(sigmas, index, noise_level)
        at, sigmas = torch.as_tensor(index), on_device(sigmas, where)
        at = on_device(at, where).reshape(-1)
        found = coefficients_at(sigmas[at], sigmas[at + 1], noise_level, kind, sigmas[1], batch)
        return coefficients_on(found, device)
    if isinstance(index, Tensor):
        schedule = schedule_of(sigmas, float(noise_level), kind, device)
        table = schedule[on_device(index, device).reshape(1, -1).expand(1, batch)].table
        return StepCoefficients._of(table, rule.gaussian, ())
    steps = _each(index)
    if sigmas.device.type == "cpu":
        values = tuple(sigmas.tolist())
        return _known(values, steps, float(noise_level), kind, batch, torch.device(device))
    return _rows(schedule_of(sigmas, float(noise_level), kind, device), steps, batch)


@functools.lru_cache(maxsize=256)
def _known(
    sigmas: tuple[float, ...],
    steps: tuple[int, ...],
    noise_level: float,
    kind: SdeKind,
    batch: int,
    device: torch.device,
) -> StepCoefficients:
    with torch.inference_mode(False):  # what is kept must serve a training step too
        return _rows(_schedule(sigmas, noise_level, kind, device), steps, batch)


def _rows(schedule: SdeSchedule, steps: tuple[int, ...], batch: int) -> StepCoefficients:
    """[1, B] of one step for all samples or of each sample's."""
    found = schedule[list(steps)]
    table = found.table.unsqueeze(1).expand(5, 1, batch).contiguous()
    gaussian = SDE_RULES[schedule.kind].gaussian
    return StepCoefficients._of(table, gaussian, found.deterministic if gaussian else ())


def top_where_one(sigma: Tensor, top: float | Tensor) -> Tensor:
    """``top`` where ``sigma`` is 1 and 1 elsewhere: the ``sigma_max`` of :func:`coefficients_at`.

    For originals that put it in the place of 1 only: from 0.999 they divide by ``1 - sigma``, where
    :class:`guard_ops.SdeSchedule` takes a first step as one from pure noise.
    """
    return torch.where(sigma == 1, on_device(number(top, sigma.device), sigma.device), 1.0)


def coefficients_at(
    sigma: Tensor,  # [B], [B, 1, ...] or []
    sigma_next: Tensor,
    noise_level: float | Tensor,
    kind: SdeKind,
    sigma_max: float | Tensor,  # []
    batch: int,
) -> StepCoefficients:
    """[1, B] coefficients of steps between arbitrary sigmas, on their device."""
    each = (sigma, sigma_next, noise_level, sigma_max)
    if all(known(x) for x in each):
        rows = (numbers(x) if isinstance(x, Tensor) else (x,) for x in each)
        return _known_at(tuple(rows), kind, batch)
    return _table_at(each, kind, batch, sigma.device)


@functools.lru_cache(maxsize=256)
def _known_at(rows: tuple[tuple[float, ...], ...], kind: SdeKind, batch: int) -> StepCoefficients:
    cpu = torch.device("cpu")
    with torch.inference_mode(False):
        each = [torch.tensor(row, dtype=torch.float64, device=cpu) for row in rows]
        return _table_at(each, kind, batch, cpu)


def _table_at(
    each: Sequence[float | Tensor], kind: SdeKind, batch: int, device: torch.device
) -> StepCoefficients:
    rows = [on_device(number(x, device), device).double().reshape(1, -1) for x in each]
    sigma, sigma_next, level, sigma_max = (row.expand(1, batch) for row in rows)
    table = coefficient_table(sigma, sigma_next, level, kind, sigma_max)
    return StepCoefficients._of(table, SDE_RULES[kind].gaussian, ())


def number(x: float | Tensor, device: torch.device) -> Tensor:
    """``x`` as a tensor; a number is filled in on ``device``, so that the host copies nothing."""
    if isinstance(x, Tensor):
        return x
    return torch.full((), x, dtype=torch.float64, device=device)


def per_sample(numbers: Tensor, like: Tensor) -> Tensor:
    """[1, B] numbers as float32 [B, 1, ...], to be broadcast over ``like`` [B, *latent]."""
    return numbers.float().reshape(-1, *[1] * (like.ndim - 1))


def sde_step(
    model_output: Tensor,  # [B, *latent]
    sample: Tensor,  # [B, *latent]
    coeffs: StepCoefficients,  # [1, B]
    prev_sample: Tensor | None,
    draw: Callable[[], Tensor],
    *,
    with_log_prob: bool = True,
    store_dtype: torch.dtype = torch.float32,
) -> Step:
    """Sample, or score, one step: ``y = a x + b v + s noise``, ``log p(y)`` and the mean.

    With ``prev_sample`` (in an update) the log-prob and the mean carry gradients to
    ``model_output``, and to ``sample`` if that requires grad. Without it (in a rollout) ``draw``
    is called for the noise.

    Args:
        store_dtype: the dtype in which the trainer keeps the next sample, to which it is rounded;
            the log-prob is that of the rounded sample, which is returned in float32.
    """
    v, x = model_output.unsqueeze(0), sample.unsqueeze(0)
    learns = torch.is_grad_enabled() and (model_output.requires_grad or sample.requires_grad)
    if prev_sample is None and not learns:
        step = ops.sde_step(v, x, coeffs, noise=draw().unsqueeze(0))
        y, log_prob = step.prev_sample, step.log_prob
        if y.dtype != store_dtype:
            y = y.to(store_dtype)
            if with_log_prob:
                log_prob = ops.log_prob(v, sample=x, prev_sample=y, coeffs=coeffs)
        kept = log_prob.squeeze(0).float() if with_log_prob else None
        return Step(y.squeeze(0).float(), kept, step.mean.squeeze(0), coeffs)
    a, b, s = (per_sample(each, model_output) for each in (coeffs.a, coeffs.b, coeffs.s))
    mean = torch.addcmul(a * sample.float(), b, model_output.float())
    if prev_sample is None:
        prev_sample = (mean + s * draw()).to(store_dtype).float()
    scored = None
    if with_log_prob:
        y = prev_sample.detach().unsqueeze(0)
        if sample.requires_grad:  # the mean in the velocity's place, as the ops' x is a constant
            v, x, coeffs_of_v = mean.unsqueeze(0), y, _of_mean(coeffs)
        else:
            coeffs_of_v = coeffs
        scored = ops.log_prob(v, sample=x, prev_sample=y, coeffs=coeffs_of_v).squeeze(0).float()
    return Step(prev_sample, scored, mean, coeffs)


def _of_mean(coeffs: StepCoefficients) -> StepCoefficients:
    """The coefficients with which a mean takes a velocity's place: a = 0, b = 1."""
    zero = torch.zeros_like(coeffs.a)
    table = torch.stack([zero, zero + 1, coeffs.s, coeffs.kappa, coeffs.dt])
    return StepCoefficients._of(table, coeffs.gaussian, coeffs.deterministic)
