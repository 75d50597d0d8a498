"""The Triton kernels for GPU tensors (``kernels/``), as torch operators."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    raise ImportError("triton is not installed")
from ..config import GuardConfig
from ..kernels import gradient as gradients
from ..kernels import guard_loss as losses
from ..kernels import launch
from ..kernels import sde_step as steps
from ..kernels import sums as summed
from ..kernels.evaluate import MAX_BATCH as MAX_BATCH  # of guard_loss
from ..objective import Metrics
from ..transitions import Transitions, compute_dtype

if TYPE_CHECKING:
    from .._C import PlainCall

if not launch.INTERPRETED and torch.cuda.device_count() + torch.xpu.device_count() == 0:
    raise ImportError(
        "torch sees no GPU, CUDA, ROCm or XPU (TRITON_INTERPRET=1 runs the kernels on the CPU, "
        "for tests)"
    )

NAME = "triton"
FUSED = True


def supports(device: torch.device) -> bool:
    return device.type in (("cpu",) if launch.INTERPRETED else ("cuda", "xpu"))


def sums(t: Transitions) -> Tensor:
    """[3, K, B] float64; reads every operand once."""
    out: Tensor = _sums(*t)
    return out


def gradient(
    t: Transitions, c: Tensor, cond: bool = True, uncond: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """As ``reference.gradient``; reads every operand that a coefficient needs once."""
    grad, grad_uncond = _gradient(c, *t, cond, uncond)
    return (grad if cond else None), (grad_uncond if uncond else None)


def sde_step(
    v: Tensor, x: Tensor, coefficients: Tensor, noise: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.sde_step``, in one pass."""
    out: tuple[Tensor, Tensor, Tensor] = _sde_step(v, x, coefficients, noise, seed)
    return out


def guard_loss(
    t: Transitions,
    advantages: Tensor,  # [K, B] float64 or float32, like the next two
    old_log_prob: Tensor | None,  # [K, B]
    step_weights: Tensor | None,  # [K, B]
    mean_std: Tensor | None,  # [2, K] float64
    config: GuardConfig,
    gaussian: bool,
    cond: bool,
    uncond: bool,
) -> tuple[Tensor, ...]:
    """Loss and gradient in one or two launches, as :mod:`guard_ops.kernels.paths` says.

    Returns:
        loss [], grad and grad_uncond (empty when not asked for), per_row [4, K, B] (log_ratio,
        excess, weights, kl), metrics [10, K] as Metrics, and ``d loss / d sums`` [3, K, B] float64,
        from which :func:`gradient` makes the same gradient again, or a multiple of it.
    """
    out: tuple[Tensor, ...] = _guard_loss(
        *t,
        advantages,
        old_log_prob,
        step_weights,
        mean_std,
        config.ratio_norm,
        config.balance,
        config.detach_stats,
        config.reduction == "mean",
        config.nonfinite == "drop",
        gaussian,
        config.target_std,
        config.std_floor,
        config.clip_low,
        config.clip_high,
        config.adv_clip,
        config.weight_floor,
        config.kl_beta,
        cond,
        uncond,
    )
    return out


def guard_loss_plain(call: PlainCall, *rest: Any) -> tuple[Tensor, ...]:
    """:func:`guard_loss` of what C++ has checked; ``rest`` from ``mean_std`` on."""
    t = Transitions._make(call.transitions())
    return guard_loss(t, *call.rows(), *rest)


def scaled(
    transitions: Callable[[], Transitions],
    sum_grads: Tensor,  # [3, K, B] float64: d loss / d sums
    grads: list[Tensor],
    factor: Tensor,  # []
    cond: bool,
    uncond: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients of ``factor * loss`` from those of ``loss``, in place.

    The host is not asked what the factor is: programs return at once where it is 1. A 16-bit
    gradient would be rounded a second time; it is computed anew from the coefficients.
    """
    gradients.rescale(
        transitions(), sum_grads, grads[0] if cond else None, grads[1] if uncond else None, factor
    )
    return tuple(grads)


# ---- torch operators ----------------------------------------------------------------------------


def _gradients(
    v: Tensor, uncond_output: Tensor | None, cond: bool, uncond: bool
) -> tuple[Tensor, Tensor]:
    """Where the gradients go: like their branch, or empty."""
    like = uncond_output if uncond else None
    return (
        torch.empty_like(v) if cond else v.new_empty(0),
        v.new_empty(0) if like is None else torch.empty_like(like),
    )


def _compute_dtype(*operands: Tensor | None) -> torch.dtype:
    return compute_dtype(*(x for x in operands if x is not None))


@torch.library.custom_op("guard_ops_triton::sums", mutates_args=())
def _sums(
    model_output: Tensor,
    model_output_uncond: Tensor | None,
    ref_model_output: Tensor | None,
    sample: Tensor | None,
    prev_sample: Tensor | None,
    old_mean: Tensor | None,
    old_model_output: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    coefficients: Tensor,
    guidance_scale: float,
) -> Tensor:
    t = Transitions(
        model_output, model_output_uncond, ref_model_output, sample, prev_sample, old_mean,
        old_model_output, noise, seed, coefficients, guidance_scale,
    )  # fmt: skip
    out: Tensor = _empty_sums(*t)
    summed.sums(t, out)
    return out


@_sums.register_fake
def _empty_sums(model_output: Tensor, *_: Any) -> Tensor:
    launch.prepare(model_output.device)
    return model_output.new_empty((3, *model_output.shape[:2]), dtype=torch.float64)


@torch.library.custom_op("guard_ops_triton::gradient", mutates_args=())
def _gradient(
    c: Tensor,
    model_output: Tensor,
    model_output_uncond: Tensor | None,
    ref_model_output: Tensor | None,
    sample: Tensor | None,
    prev_sample: Tensor | None,
    old_mean: Tensor | None,
    old_model_output: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    coefficients: Tensor,
    guidance_scale: float,
    cond: bool,
    uncond: bool,
) -> tuple[Tensor, Tensor]:
    t = Transitions(
        model_output, model_output_uncond, ref_model_output, sample, prev_sample, old_mean,
        old_model_output, noise, seed, coefficients, guidance_scale,
    )  # fmt: skip
    grad, grad_uncond = _gradients(model_output, model_output_uncond, cond, uncond)
    gradients.gradient(t, c, grad if cond else None, grad_uncond if uncond else None)
    return grad, grad_uncond


@_gradient.register_fake
def _fake_gradient(
    _: Tensor, model_output: Tensor, model_output_uncond: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    return _gradients(model_output, model_output_uncond, *rest[-2:])


@torch.library.custom_op("guard_ops_triton::sde_step", mutates_args=())
def _sde_step(
    v: Tensor, x: Tensor, coefficients: Tensor, noise: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, _ = _empty_step(v, x, coefficients, noise, seed)
    square = steps.sde_step(v, x, coefficients, noise, seed, y, mean)
    return y, mean, square


def _empty_step(
    v: Tensor, x: Tensor, coefficients: Tensor, noise: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    launch.prepare(x.device)
    wide = _compute_dtype(v, x, noise)
    square = x.new_empty(x.shape[:2], dtype=torch.float64)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=wide), square


_sde_step.register_fake(_empty_step)


@torch.library.custom_op("guard_ops_triton::guard_loss", mutates_args=())
def _guard_loss(
    model_output: Tensor,
    model_output_uncond: Tensor | None,
    ref_model_output: Tensor | None,
    sample: Tensor | None,
    prev_sample: Tensor | None,
    old_mean: Tensor | None,
    old_model_output: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    coefficients: Tensor,
    guidance_scale: float,
    advantages: Tensor,
    old_log_prob: Tensor | None,
    step_weights: Tensor | None,
    mean_std: Tensor | None,
    ratio_norm: str,
    balance: str,
    detach_stats: bool,
    mean_reduction: bool,
    drop: bool,
    gaussian: bool,
    target_std: float,
    std_floor: float,
    clip_low: float,
    clip_high: float,
    adv_clip: float,
    weight_floor: float,
    kl_beta: float,
    cond: bool,
    uncond: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    t = Transitions(
        model_output, model_output_uncond, ref_model_output, sample, prev_sample, old_mean,
        old_model_output, noise, seed, coefficients, guidance_scale,
    )  # fmt: skip
    out = _empty_loss(*t[:8], cond, uncond)
    loss, grad, grad_uncond, per_row, metrics, sum_grads = out
    problem = losses.Objective(
        advantages, old_log_prob, step_weights, mean_std, ratio_norm, balance, detach_stats,
        mean_reduction, drop, gaussian, target_std, std_floor, clip_low, clip_high, adv_clip,
        weight_floor, kl_beta,
    )  # fmt: skip
    written = grad if cond else None, grad_uncond if uncond else None
    losses.guard_loss(t, problem, *written, loss, per_row, metrics, sum_grads)
    return loss, grad, grad_uncond, per_row, metrics, sum_grads


def _empty_loss(*args: Any) -> tuple[Tensor, ...]:
    cond, uncond = args[-2:]
    v = args[0]
    launch.prepare(v.device)
    per_row = v.new_empty((4, *v.shape[:2]), dtype=_compute_dtype(*args[:8]))
    return (
        per_row.new_empty(()),
        *_gradients(v, args[1], cond, uncond),
        per_row,
        per_row.new_empty((len(Metrics._fields), v.shape[0])),
        per_row.new_empty((3, *v.shape[:2]), dtype=torch.float64),
    )


_guard_loss.register_fake(_empty_loss)
