"""Other objectives on the same kernels: each is a few lines over ``guard_ops.log_ratio``.

The kernels give two numbers per transition, ``log_ratio`` and ``kl_old``, and take two coefficients
back; what is done in between is plain differentiable arithmetic on [K, B] numbers. Every function
here takes ``t = guard_ops.log_ratio(...)``, whose fields are [K, B], and advantages [B], and
returns a loss []. Ratios are formed as ``1 + expm1(log r)``: near 1 that keeps the digits.

    python examples/objectives.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import guard_ops as go


def flow_dppo(t: go.LogRatio, advantages: Tensor, *, threshold: float = 1e-4) -> Tensor:
    """Flow-DPPO: no clip; a transition that is far from the old policy and moves on is masked.

    It is far if ``KL(old || new) >= threshold``, which is exact for Gaussians. It moves on if the
    ratio is on the side of 1 that the advantage asks for.
    """
    excess = torch.expm1(t.log_ratio)
    moves_on = (excess > 0) & (advantages > 0) | (excess < 0) & (advantages < 0)
    keep = ~((t.kl_old >= threshold) & moves_on)
    return (-advantages * (1 + excess) * keep.detach()).mean()


def cispo(t: go.LogRatio, advantages: Tensor, *, low: float = 1.0, high: float = 1e-3) -> Tensor:
    """CISPO (MiniMax-M1, arXiv:2506.13585): the clipped ratio is a weight without a gradient.

    The loss is ``-sg(clip(r)) A log p``, so clipped transitions still learn. ``log_ratio`` takes
    the place of ``log p``, from which it differs by a constant.
    """
    weight = 1 + torch.expm1(t.log_ratio.detach()).clamp(-low, high)
    return (-weight * advantages * t.log_ratio).mean()


def sapo(
    t: go.LogRatio, advantages: Tensor, *, positive: float = 1e3, negative: float = 1.05e3
) -> Tensor:
    """SAPO (arXiv:2511.20347): a sigmoid gate instead of the clip, steeper for negative advantages.

    The loss is ``-A f(r)`` with ``f(r) = 4 / tau sigmoid(tau (r - 1))``, whose slope at 1 is 1. The
    temperatures are of the size that flow ratios need, whose spread is 1e-4 to 1e-2.
    """
    tau = torch.where(advantages > 0, positive, negative).to(advantages)
    gate = 4 / tau * torch.sigmoid(tau * torch.expm1(t.log_ratio))
    return (-advantages * gate).mean()


def gspo(t: go.LogRatio, advantages: Tensor, *, clip: float = 1e-4) -> Tensor:
    """GSPO (arXiv:2507.18071): one ratio per sequence, here the trajectory's K steps.

    The ratio is ``s = exp(mean_k log r_k)``, which is clipped as one number; its gradient reaches
    every step alike.
    """
    excess = torch.expm1(t.log_ratio.mean(0))
    clipped = excess.clamp(-clip, clip)
    return torch.maximum(-advantages * (1 + excess), -advantages * (1 + clipped)).mean()


def dual_clip(
    t: go.LogRatio, advantages: Tensor, *, clip: float = 1e-4, bound: float = 3.0
) -> Tensor:
    """Dual clip (arXiv:1912.09729): for negative advantages the loss stops at ``bound |A|``."""
    excess = torch.expm1(t.log_ratio)
    losses = torch.maximum(
        -advantages * (1 + excess), -advantages * (1 + excess.clamp(-clip, clip))
    )
    return torch.where(advantages < 0, losses.clamp(max=-bound * advantages), losses).mean()


OBJECTIVES = {
    "Flow-DPPO": flow_dppo,
    "CISPO": cispo,
    "SAPO": sapo,
    "GSPO": gspo,
    "dual clip": dual_clip,
}


def main() -> None:
    """What each objective makes of the same four transitions of eight samples.

    On policy all of them have the policy gradient, that of ``-A log r``. Here the new policy is as
    far from the old one as their bounds, so some transitions are weighed less, or left out.
    """
    torch.manual_seed(0)
    coeffs = go.SdeSchedule(torch.linspace(1, 0, 11), noise_level=0.7)[2:6]
    v_old, x, noise = (torch.randn(4, 8, 16, 32, 32) for _ in range(3))
    y = go.sde_step(v_old, x, coeffs, noise=noise).prev_sample
    v = (v_old + 4e-2 * torch.randn_like(v_old)).requires_grad_()
    advantages = torch.randn(8)

    def norms(objective: Callable[..., Tensor]) -> tuple[float, Tensor]:
        """The loss, and the norm of each transition's gradient [K, B]."""
        t = go.log_ratio(v, coeffs=coeffs, sample=x, prev_sample=y, old_model_output=v_old)
        loss = objective(t, advantages)
        (grad,) = torch.autograd.grad(loss, v)
        return loss.item(), grad.flatten(2).norm(dim=2)

    _, plain = norms(lambda t, advantages: (-advantages * t.log_ratio).mean())
    print(
        f"{'objective':10s} {'loss':>10s} {'gradient':>10s} {'left out':>10s} {'least weight':>13s}"
    )
    for name, objective in OBJECTIVES.items():
        loss, found = norms(objective)
        weights = found / plain
        kept = weights[weights > 0]
        print(
            f"{name:10s} {loss:10.5f} {found.norm().item():10.2e} "
            f"{weights.numel() - kept.numel():4d} of {weights.numel()} {kept.min().item():13.5f}"
        )


if __name__ == "__main__":
    main()
