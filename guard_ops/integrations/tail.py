"""From a velocity to a framework's loss: what the frameworks' ``training_loss`` functions share.

Their ratios are all ``exp(z)`` with ``z`` linear in a transition's two sums. Where ``z`` is one of
:func:`guard_ops.guard_loss`'s (:func:`plain`, :func:`closed_form`), that computes loss and gradient
in one pass; otherwise (:func:`of_sums`) the latents are read once forward and once backward.
Nothing waits for a device.

A latent of 16 x 64 x 64 takes a kernel as long as a hundred small operators take the host. So what
a step's coefficients alone decide is kept (:func:`kept`), and of the diagnostics only what a script
logs is taken apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import autograd, loss, objective, transitions
from ..backends import select
from ..config import GuardConfig, RatioNorm
from ..schedule import StepCoefficients
from ..transitions import Transitions

F = TypeVar("F", bound=Callable[..., Any])
ABOVE = objective.Metrics._fields.index("clip_fraction_high")  # clip_fraction_low is the next


def kept(make: F) -> F:
    """``make(coeffs, ...)``, made once for coefficients on the CPU.

    Those of steps that the host looks up are kept themselves. It is made outside of inference mode,
    as it serves a training step too.
    """

    @functools.lru_cache(maxsize=256)
    def known(coeffs: StepCoefficients, *rest: Any) -> Any:
        with torch.inference_mode(False):
            return make(coeffs, *rest)

    @functools.wraps(make)
    def get(coeffs: StepCoefficients, *rest: Any) -> Any:
        if coeffs.device.type != "cpu" or torch.compiler.is_compiling():
            return make(coeffs, *rest)
        return known(coeffs, *rest)

    return get  # type: ignore[return-value]


def number(value: float, like: Tensor) -> Tensor | float:
    """``value`` as an operand beside ``like``.

    Of a Python number torch makes a tensor in every call, which takes longer than the operator. One
    without dimensions may be on the CPU, whatever the device of ``like`` is.
    """
    return value if torch.compiler.is_compiling() else _number(value, like.dtype)


@functools.lru_cache(maxsize=64)
def _number(value: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


class Transition(NamedTuple):
    """What a script has of one timestep; latents are [B, *latent]."""

    model_output: Tensor  # v
    sample: Tensor  # x
    prev_sample: Tensor  # y
    coeffs: StepCoefficients  # [1, B]
    old_mean: Tensor | None = None  # or
    old_log_prob: Tensor | None = None  # [B]
    ref_model_output: Tensor | None = None  # where the loss has a KL to a reference


class Bounds(NamedTuple):
    """Where ratios and advantages are clipped: to ``1 - low`` and ``1 + high``, and ``+-adv``."""

    low: float
    high: float
    adv: float


class Exponent(NamedTuple):
    """``z = sum(rates sums)``, plus ``sum(across sums)`` over the whole batch, in float64."""

    rates: Tensor  # [3, 1, B], of S1, S2 and the reference's sum (0)
    both: Tensor  # [2, 3, 1, B]: those of log r, and ``rates``; [1, 3, 1, B] where they are one
    across: Tensor | None = None  # [3, 1, 1]


class Clipped(NamedTuple):
    """A clipped surrogate and what frameworks log of its ratio.

    ``loss`` and ``from_reference`` carry gradients, nothing else does.
    """

    loss: Tensor  # [], mean over the batch
    per_row: Tensor  # [2 or more, 1, B] log_ratio, ratio - 1, ...
    outside: Tensor  # [2, 1]: the shares of the batch whose ratio is above its bound, and below
    from_reference: Tensor | None = None  # [B] mean over the latent of (mean - reference's mean)^2
    kl: Tensor | None = None  # [B] to the reference, which is in ``loss`` already

    def log_ratio(self) -> Tensor:
        """[B]."""
        return self.per_row[0, 0]

    def excess(self) -> Tensor:
        """The ratio less 1, [B]."""
        return self.per_row[1, 0]

    def above_and_below(self) -> tuple[Tensor, Tensor]:
        """The two shares, [] each; their sum is ``outside.sum()``."""
        above, below = self.outside.squeeze(1).unbind()
        return above, below


def plain(
    t: Transition,
    advantages: Tensor,
    bounds: Bounds,
    weights: Tensor | None = None,
    kl_beta: float = 0.0,
) -> Clipped:
    """``mean_i w max(-A r, -A clip(r))``, ``r`` the plain ratio. advantages, weights: [B].

    With a reference and ``kl_beta``, that times the mean of ``mean((mean - ref)^2) / (2 s^2)``, the
    KL of Gaussians, is added in the same pass; without it ``from_reference`` is for another KL.
    """
    if t.ref_model_output is None:
        return _one_pass(t, advantages, bounds, "none", weights)
    if kl_beta:
        return _one_pass(t, advantages, bounds, "none", weights, kl_beta)
    return of_sums(t, advantages, bounds, _log_ratio(t.coeffs, numel(t)), _share(t, weights))


def closed_form(
    t: Transition, advantages: Tensor, bounds: Bounds, weights: Tensor | None = None
) -> Clipped:
    """The same with ``exp(scale log r + mean((mean - old)^2) / (2 scale))``.

    The scale is ``std_dev_t sqrt(-dt)`` of each sample. A Gaussian's is its ``s``, with which this
    is the paper's RatioNorm; cps has ``s sqrt(-dt)``.
    """
    if t.ref_model_output is None and t.coeffs.gaussian:
        return _one_pass(t, advantages, bounds, "closed_form", weights)
    return of_sums(t, advantages, bounds, _own_scale(t.coeffs, numel(t)), _share(t, weights))


@kept
def _log_ratio(coeffs: StepCoefficients, numel: int) -> Exponent:
    rates = log_ratio_rates(coeffs, numel)
    return Exponent(rates, rates.unsqueeze(0))


@kept
def _own_scale(coeffs: StepCoefficients, numel: int) -> Exponent:
    scale = coeffs.s if coeffs.gaussian else coeffs.s * (-coeffs.dt).sqrt()
    return scaled(log_ratio_rates(coeffs, numel), scale, 1 / (2 * scale * numel))


def scaled(
    log_ratio: Tensor,  # [3, 1, B]: of log_ratio_rates
    scale: Tensor,  # [] or [1, B]
    square: Tensor,  # [] or [1, B]
    *,
    of_batch: bool = False,
) -> Exponent:
    """``z = scale log r + square S2``, with ``of_batch`` the mean of S2 over the batch."""
    rates, zero = log_ratio * scale, torch.zeros_like(square)
    of_square = torch.stack([zero, square, zero])
    if not of_batch:
        rates = rates + of_square.reshape(3, 1, -1)
        return Exponent(rates, torch.stack([log_ratio, rates]))
    across = of_square.reshape(3, 1, 1) / log_ratio.shape[-1]
    return Exponent(rates, torch.stack([log_ratio, rates]), across)


def log_ratio_rates(coeffs: StepCoefficients, numel: int) -> Tensor:
    """[3, 1, B] of ``log r = kappa/D (2 S1 - S2)``; the log-prob form's S1 is 0."""
    rate = coeffs.kappa / numel
    return torch.stack([2 * rate, -rate, torch.zeros_like(rate)])


def numel(t: Transition) -> int:
    """Elements of a latent."""
    return t.model_output.numel() // len(t.model_output)


def _one_pass(
    t: Transition,
    advantages: Tensor,
    bounds: Bounds,
    norm: RatioNorm,
    weights: Tensor | None,
    kl_beta: float = 0.0,
) -> Clipped:
    make = _config.__wrapped__ if torch.compiler.is_compiling() else _config
    rows = {"advantages": advantages, "step_weights": weights}
    v, given = _operands(t, rows)
    given["config"] = make(norm, bounds, kl_beta)
    _, value, per_row, metrics = loss.computed(v, given)
    kl = per_row[3, 0] if kl_beta else None
    return Clipped(value, per_row, metrics[ABOVE : ABOVE + 2], kl=kl)


def _operands(t: Transition, rows: dict[str, Tensor | None]) -> tuple[Tensor, dict[str, Any]]:
    """The velocity, and the rest of a call's arguments, as those of one step.

    Where the host knows that all samples are at one step, [B, *latent] and [B] numbers are; else
    they become [1, B, ...].
    """
    given = t._asdict() | rows
    one = _one_step(t.coeffs)
    if one is None:
        given = {n: x.unsqueeze(0) if isinstance(x, Tensor) else x for n, x in given.items()}
    else:
        given["coeffs"] = one
    return given.pop("model_output"), given


def _one_step(coeffs: StepCoefficients) -> StepCoefficients | None:
    """[1, B] coefficients as those of one step, [], if the host knows that all samples are at one.

    Those of steps that the host looks up are kept, and looked at once.
    """
    if coeffs.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return _known_one_step(coeffs)


@functools.lru_cache(maxsize=256)
def _known_one_step(coeffs: StepCoefficients) -> StepCoefficients | None:
    with torch.inference_mode(False):
        first = coeffs.table[:, 0, :1]
        if not torch.equal(coeffs.table[:, 0], first.expand_as(coeffs.table[:, 0])):
            return None
        return StepCoefficients._of(first[:, 0].clone(), coeffs.gaussian, coeffs.deterministic)


@functools.lru_cache(maxsize=64)
def _config(norm: RatioNorm, bounds: Bounds, kl_beta: float) -> GuardConfig:
    return GuardConfig(
        norm,
        clip_low=bounds.low,
        clip_high=bounds.high,
        adv_clip=bounds.adv,
        balance="none",
        kl_beta=kl_beta,
    )


def of_sums(
    t: Transition,
    advantages: Tensor,  # [B]
    bounds: Bounds,
    exponent: Exponent,
    share: Tensor,  # [] or [B]: -w / B
) -> Clipped:
    """``mean_i w max(-A r, -A clip(r))`` with any ``r = exp(z)``: two passes.

    In the log-prob form ``z`` is log r, so the density's constants and the old log-prob are in it.
    """
    v, given = _operands(t, {})
    shape = transitions.check_shape(v, given["coeffs"])
    operands = transitions.gather(shape, v, given)
    offset = None
    old = transitions.old_log_prob(shape, v, given)
    if old is not None:
        offset = _constants(t.coeffs, numel(t)) - old
    given = {"advantages": advantages if shape.one_step else advantages.unsqueeze(0)}
    slope = transitions.per_transition("advantages", given["advantages"], shape, v.device)
    slope = slope.clamp(-bounds.adv, bounds.adv) * share
    found = _Surrogate.apply(  # type: ignore[no-untyped-call]
        select(v.device),
        bounds,
        t.ref_model_output is not None,
        slope,
        offset,
        *exponent,
        *operands.tensors(),
    )
    return Clipped(*found)


def _share(t: Transition, weights: Tensor | None) -> Tensor:
    """``-w / B``, [] or [B]."""
    share = _equal_share(t.coeffs)
    return share if weights is None else share * checked_weights(t, weights)


def checked_weights(t: Transition, weights: Tensor) -> Tensor:
    """[B]; raises for another shape or device."""
    v = t.model_output
    shape = transitions.CallShape(1, len(v), tuple(v.shape), one_step=True)
    return transitions.per_transition("step_weights", weights, shape, v.device)[0]


@kept
def _equal_share(coeffs: StepCoefficients) -> Tensor:
    return torch.full_like(coeffs.s[0, 0], -1 / coeffs.shape[-1])


@kept
def _constants(coeffs: StepCoefficients, numel: int) -> Tensor:
    """Those of the log-density, [1, B]."""
    return objective.log_density(torch.zeros_like(coeffs.kappa), coeffs, numel, "mean")


class _Surrogate(torch.autograd.Function):
    """The clipped surrogate of the sums, with its own gradient.

    Autograd over it takes three times the operators, which cost more than the latents do.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: ModuleType,
        bounds: Bounds,
        with_reference: bool,
        slope: Tensor,  # [1, B] -A w / B
        offset: Tensor | None,  # [1, B], of log r
        rates: Tensor,
        both: Tensor,
        across: Tensor | None,
        *tensors: Any,  # those of Transitions.tensors()
    ) -> Any:
        ctx.set_materialize_grads(False)  # else torch makes zeros for what is logged
        t = Transitions.take(iter(tensors), 1.0)
        sums = backend.sums(t)  # [3, 1, B] float64
        log_ratio, *other = (both * sums).sum(1).unbind()
        if offset is not None:
            log_ratio = log_ratio + offset
        z = other[0] if other else log_ratio
        if across is not None:
            z = z + (across * sums).sum()
        excess = torch.expm1(z)
        inside = excess.clamp(-bounds.low, bounds.high)
        free, bound = (torch.addcmul(slope, slope, x) for x in (excess, inside))
        to_z = free.masked_fill(free < bound, 0.0)  # NaN stays one
        to_sums = rates * to_z
        if across is not None:
            to_sums = torch.addcmul(to_sums, across, to_z.sum())
        autograd._save(ctx, (to_sums, *tensors))
        ctx.backend, ctx.numel = backend, t.latents.model_output.shape[-1]
        per_row = torch.stack([log_ratio, excess])
        outside = torch.stack([excess > inside, excess < inside]).mean(-1, dtype=torch.float32)
        ctx.mark_non_differentiable(per_row, outside)
        from_reference = sums[2, 0] / ctx.numel if with_reference else None
        return torch.maximum(free, bound).sum().float(), per_row, outside, from_reference

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *logged: Tensor | None) -> Any:
        to_sums, *tensors = autograd._saved(ctx)
        assert to_sums is not None
        coefficients = torch.zeros_like(to_sums) if grad is None else to_sums * grad
        *_, of_reference = logged
        if of_reference is not None:
            coefficients[2, 0] += of_reference / ctx.numel
        t = Transitions.take(iter(tensors), 1.0)
        to_velocity, _ = ctx.backend.gradient(t, coefficients)
        return (*(None,) * 8, to_velocity, *(None,) * (len(tensors) - 1))
