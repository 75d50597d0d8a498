"""The formulas in plain PyTorch, against which every other backend is tested.

They run on any device and in any dtype, and are twice differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..transitions import Transitions
from .philox import normals

NAME = "reference"
FUSED = False  # loss.py composes the loss of sums, objective.py and gradient


def supports(device: torch.device) -> bool:
    return True


def _mean(a: Tensor, b: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """``a x + b v``, written once, so that equal inputs give equal bits in rollout and loss."""
    return a * x + b * v


def _velocity(t: Transitions) -> Tensor:
    v = t.latents.model_output.to(t.compute_dtype())
    if t.latents.model_output_uncond is None:
        return v
    uncond = t.latents.model_output_uncond.to(t.compute_dtype())
    return uncond + t.guidance_scale * (v - uncond)


def _delta_e(t: Transitions, v: Tensor) -> tuple[Tensor, Tensor]:
    """``delta = mean - m`` and ``e = y - m`` [K, B, D] of the form that ``t`` is given in."""
    dtype = t.compute_dtype()
    a, b, s, *_ = t.coefficients.to(dtype).unsqueeze(-1)
    latents = t.latents

    def wide(x: Tensor | None) -> Tensor:
        assert x is not None
        return x.to(dtype)

    if t.form() in ("noise", "seeded"):
        noise = normals(t.seed, v.shape[-1], dtype) if t.seed is not None else wide(latents.noise)
        delta, e = b * (v - wide(latents.old_model_output)), s * noise
    else:
        x, y = wide(latents.sample), wide(latents.prev_sample)
        if t.form() == "velocity":
            old = wide(latents.old_model_output)
            delta, e = b * (v - old), (y - a * x) - b * old
        elif t.form() == "mean":
            m = wide(latents.old_mean)
            delta, e = _mean(a, b, x, v) - m, y - m
        else:
            delta, e = _mean(a, b, x, v) - y, torch.zeros_like(y)
    return _counted(t, delta), _counted(t, e)


def _counted(t: Transitions, x: Tensor) -> Tensor:
    """``x`` [K, B, D], 0 where the mask says that an element does not count."""
    return x if t.latents.mask is None else torch.where(t.latents.mask, x, 0.0)


def sums(t: Transitions) -> Tensor:
    """``S1 = sum(delta e)``, ``S2 = sum(delta^2)``, ``sum((b (v - v_ref))^2)``: [3, K, B] float64.

    The third is 0 without ``ref_model_output``.
    """
    v = _velocity(t)
    delta, e = _delta_e(t, v)
    out = [
        (delta * e).sum(-1, dtype=torch.float64),
        (delta * delta).sum(-1, dtype=torch.float64),
    ]
    if t.latents.ref_model_output is None:
        return torch.stack([*out, torch.zeros_like(out[0])])
    from_ref = _counted(t, v - t.latents.ref_model_output.to(v.dtype))
    drift = t.coefficients[1].to(v.dtype).unsqueeze(-1) * from_ref
    return torch.stack([*out, (drift * drift).sum(-1, dtype=torch.float64)])


def gradient(
    t: Transitions,
    c: Tensor,  # [3, K, B] float64: d loss / d sums
    cond: bool = True,
    uncond: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """``d loss / d v = b (c1 e + 2 c2 delta) + 2 c3 b^2 (v - v_ref)`` for both guidance branches.

    A transition whose three coefficients are 0 gets 0, whatever its operands hold, as does an
    element that does not count.
    """
    v = _velocity(t)
    delta, e = _delta_e(t, v)
    b = t.coefficients[1].to(v.dtype).unsqueeze(-1)
    c1, c2, c3 = c.to(v.dtype).unsqueeze(-1)
    g = b * (c1 * e + 2 * c2 * delta)
    if t.latents.ref_model_output is not None:
        g = g + 2 * c3 * b**2 * (v - t.latents.ref_model_output.to(v.dtype))
    g = _counted(t, g)
    unused = (c == 0).all(0).unsqueeze(-1) & ~torch.isfinite(g).all(-1, keepdim=True)
    g = torch.where(unused, 0.0, g)
    latents = t.latents
    if latents.model_output_uncond is None:
        return (g.to(latents.model_output.dtype) if cond else None), None
    scale = t.guidance_scale
    return (
        (scale * g).to(latents.model_output.dtype) if cond else None,
        ((1 - scale) * g).to(latents.model_output_uncond.dtype) if uncond else None,
    )


def sde_step(t: Transitions) -> tuple[Tensor, Tensor, Tensor]:
    """``mean = a x + b v``, ``y = mean + s noise``, ``sum((y - mean)^2)`` over what counts.

    ``t`` has the latents of ``transitions.STEP_LATENTS`` and noise or a seed. ``y`` has the dtype
    of ``x``, the mean is at least float32, the sum [K, B] is float64.
    """
    dtype = t.compute_dtype()
    a, b, s, *_ = t.coefficients.to(dtype).unsqueeze(-1)
    v, x, noise = _velocity(t), t.latents.sample, t.latents.noise
    assert x is not None
    if noise is None:
        assert t.seed is not None
        noise = normals(t.seed, v.shape[-1], dtype)
    mean = _mean(a, b, x.to(dtype), v)
    y = (mean + s * noise.to(dtype)).to(x.dtype)
    square = _counted(t, y.to(dtype) - mean) ** 2
    return y, mean, square.sum(-1, dtype=torch.float64)
