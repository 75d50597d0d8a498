"""UniRL (github.com/Tencent-Hunyuan/UniRL): its SDE strategies' transition, Flow-DPPO's loss.

FlowGRPO, and MixGRPO, which is FlowGRPO over a window of steps, compute on [B, S] log-probs that
``stage.replay`` made with :func:`denoise`; nothing of them is left to fuse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..schedule import SdeKind
from . import guard, steps
from .flow_grpo import draw_noise

KINDS: dict[str, SdeKind] = {"flow": "flow_sde", "cps": "cps", "dance": "dance_sde"}
DETERMINISTIC = 1e-7  # below this eta UniRL gives no log-prob


def denoise(
    self: Any,
    noise_pred: Tensor,
    sample: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    *,
    eta: float = 1.0,
    prev_sample: Tensor | None = None,
    sigma_max: float = 0.99,
    step_index: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``denoise`` of ``FlowSDEStrategy``, ``CPSSDEStrategy`` and ``DanceSDEStrategy``, fused.

    Args:
        self: the strategy; its ``canonical_name`` is "flow", "cps" or "dance".
        noise_pred: velocity, [B, *latent]. sample: x. prev_sample: y of a replay, or None.
        sigma, sigma_next: [] or [B]. step_index: has no effect, as in the original.

    Returns:
        ``(prev_sample, log_prob [B], prev_sample_mean)``, float32; the log-prob is None if eta <
        1e-7. A sample, also one that is given, is rounded to the dtype of ``sample`` as it will be
        stored, and its log-prob is that of the rounded one.

    Raises:
        ValueError: the strategy is another, such as DPM-Solver's, which has no density.
    """
    name = getattr(self, "canonical_name", None)
    if name not in KINDS:
        raise ValueError(f"the strategy is {name!r}; it needs one of {', '.join(KINDS)}")
    scored = eta >= DETERMINISTIC
    if not scored:  # nor is its sample rounded
        sample = sample.float()
    if prev_sample is not None:
        prev_sample = prev_sample.to(sample.dtype).float()
    sigma = sigma.float()
    top = steps.top_where_one(sigma, float(sigma_max))
    coeffs = steps.coefficients_at(
        sigma, sigma_next.float(), float(eta), KINDS[name], top, len(sample)
    )
    done = steps.sde_step(
        noise_pred,
        sample,
        steps.coefficients_on(coeffs, sample.device),
        prev_sample,
        lambda: draw_noise(noise_pred, None),
        with_log_prob=scored,
        store_dtype=sample.dtype,
    )
    return done.prev_sample, done.log_prob, done.mean


def flowdppo_kl_adv_loss(
    *,
    new_logp: Tensor,
    old_logp: Tensor,
    new_means: Tensor,
    old_means: Tensor,
    advantages: Tensor,
    sigma_t: Tensor,
    kl_mask_threshold: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``_flowdppo_kl_adv_loss`` with one pass over the means.

    Args:
        new_logp, old_logp, advantages: [B, S]. new_means, old_means: [B, S, *latent].
        sigma_t: one number a step or a transition, to be broadcast over the means: [S, 1, ...],
            [1, S, 1, ...], [B, S, 1, ...] or []. kl_mask_threshold: a transition with a larger KL
            has no gradient if it moves where its advantage pushes it.

    Returns:
        The loss of each transition, [B, S], and the original's metrics.

    Raises:
        ValueError: ``sigma_t`` cannot be broadcast so, or has several numbers for a transition.
    """
    with torch.no_grad():
        square = guard.mean_square(new_means.flatten(0, 1), old_means.flatten(0, 1))
        kl = square.view_as(new_logp) / (2 * _of_transitions(sigma_t, new_means).double() ** 2)
    log_diff = new_logp.double() - old_logp.double()
    excess = torch.expm1(log_diff)
    moved, adv = excess.detach(), advantages.detach().double()
    far = kl >= kl_mask_threshold
    up, down = far & (moved > 0) & (adv > 0), far & (moved < 0) & (adv < 0)
    removed = up | down
    losses = torch.where(removed, 0.0, -adv * (1 + excess)).to(new_logp.dtype)
    ratio = 1 + moved
    spread = ratio.std() if ratio.numel() > 1 else torch.zeros_like(kl.mean())
    metrics = {
        "ratio_mean": ratio.mean(),
        "ratio_std": spread,
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "approx_kl": 0.5 * log_diff.detach().square().mean(),
        "kl_new_old_mean": kl.mean(),
        "kl_new_old_max": kl.max(),
        "kl_mask_fraction": far.double().mean(),
        "pos_rm_fraction": up.double().mean(),
        "neg_rm_fraction": down.double().mean(),
        "masked_fraction": removed.double().mean(),
        "unmasked_fraction": (~removed).double().mean(),
    }
    return losses, {name: value.float() for name, value in metrics.items()}


def _of_transitions(sigma_t: Tensor, means: Tensor) -> Tensor:
    """``sigma_t`` as [B, S], for means [B, S, *latent] over which it is broadcast."""
    latent = means.ndim - 2
    try:
        whole = torch.broadcast_to(sigma_t, means.shape)
    except RuntimeError:
        whole = None
    if whole is None or any(size != 1 for size in sigma_t.shape[-latent:]):
        raise ValueError(
            f"`sigma_t` has shape {tuple(sigma_t.shape)}; for means {tuple(means.shape)} it needs "
            f"[B, S{', 1' * latent}], of which B and S may be 1 or left out"
        )
    for _ in range(latent):
        whole = whole[..., 0]
    return whole
