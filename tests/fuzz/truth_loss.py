"""The truth of the objective: docs/math.md's RatioNorm, clip, balance, loss, metrics, gradient."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from rounding import DOUBLE, Rounded, total
from torch import Tensor
from truth import Expected, Operands, Sums, UndecidedError, gradient, representable, sums


class Mean:
    """Means over each step's finite samples."""

    def __init__(self, finite: Tensor) -> None:
        self.finite, self.count = finite, finite.sum(-1).double()

    def __call__(self, x: Rounded) -> Rounded:  # [K, B] -> [K]
        return x.where(self.finite).sum() / Rounded.exact(self.count)

    def std(self, x: Rounded, mean: Rounded) -> Rounded:
        """The root mean square changes by no more than that of the errors."""
        d = self.distance(x, mean).where(self.finite)
        largest = d.value.abs().amax(-1, keepdim=True).clamp(min=DOUBLE.tiny)
        value, error = (
            largest[..., 0] * ((t / largest) ** 2).sum(-1).div(self.count).sqrt()
            for t in (d.value, d.error)
        )
        return Rounded(value, error + 8 * DOUBLE.unit * value, DOUBLE)

    def distance(self, x: Rounded, mean: Rounded) -> Rounded:
        """From the mean, [K, B]; of a single number the mean is that number exactly."""
        d = total(x, -mean.shaped(lambda t: t.unsqueeze(-1)))
        return d.where((self.count > 1).unsqueeze(-1))


class Norm(NamedTuple):
    """``r_hat - 1`` and its derivative by the log-ratio, statistics held constant."""

    excess: Rounded  # [K, B]
    slope: Rounded
    by_std: Rounded  # (u - mean) / std, 0 where the step is degenerate
    degenerate: Tensor | float = 0.0  # [K], 1 where it is


def ratio_norm(
    u: Rounded, unbiased: Rounded, o: Operands, mean: Mean, config: Any, statistics: Any
) -> Norm:
    """RatioNorm of ``u = r - 1``; ``unbiased`` is ``log r + kl_old``, of which the paper's is."""
    zero = Rounded.exact(torch.zeros_like(u.value))
    ratio = Rounded(1 + u.value, u.error + 2 * DOUBLE.unit * (1 + u.value.abs()), DOUBLE)
    if config.ratio_norm == "none":
        return Norm(u, ratio, zero)
    if config.ratio_norm == "closed_form":
        s = Rounded.exact(o.table["s"])
        excess = (s * unbiased).expm1()
        return Norm(excess, s * (excess + 1.0), zero)
    if statistics is None:
        center = mean(u)
        spread = mean.std(u, center)
    else:
        center, spread = (
            Rounded(x.reshape(-1), 4 * DOUBLE.unit * x.reshape(-1).abs(), DOUBLE)
            for x in (statistics.mean, statistics.std)
        )
    floor, target = std_floor(o, config), config.target_std
    known = mean.count > 0
    error = spread.error + 1e-14 * floor
    above, below = spread.value - error > floor, spread.value + error <= floor
    if bool((known & ~above & ~below).any()):
        raise UndecidedError("a std at its floor")
    spread = spread.where(above, target).shaped(lambda t: t.unsqueeze(-1))
    if statistics is None:
        z = mean.distance(u, center) / spread
    else:
        z = total(u, -center.shaped(lambda t: t.unsqueeze(-1))) / spread
    degenerate = below.double()
    return Norm(target * z, (target * ratio) / spread, z.where(above.unsqueeze(-1)), degenerate)


def std_floor(o: Operands, config: Any) -> Tensor:
    """The spread up to which a step is degenerate, [K]: docs/math.md, one step at a time."""
    out = []
    for k in range(o.steps):
        if config.std_floor != "auto":
            out.append(float(config.std_floor))
            continue
        scale = 1.0 if o.scale is None else float(o.scale)
        rounding = math.sqrt(2) * o.coarsest * math.hypot(scale, 1 - scale)
        b, s, kappa = (o.table[name][k] for name in ("b", "s", "kappa"))
        gains = 2 * kappa * s * b.abs() / math.sqrt(o.numel)
        if config.reduction == "sum":
            gains = gains * o.numel
        mean_square = math.fsum((gains**2).tolist()) / o.batch
        out.append(max(1e-8, min(rounding * math.sqrt(mean_square), config.target_std)))
    return torch.tensor(out, dtype=torch.float64)


def beyond(excess: Rounded, bound: float) -> tuple[Tensor, Tensor]:
    """Whether ``excess > bound``, and whether rounding might decide otherwise."""
    high = excess.value > bound
    return high, ((excess.value - bound).abs() <= excess.error) & math.isfinite(bound)


def balance(o: Operands, excess: Rounded, finite: Tensor, config: Any) -> Rounded:
    """The weights over each sample's finite steps, [K, B]."""
    if "step_weights" in o.rows:
        weights = Rounded.exact(o.rows["step_weights"])
    elif config.balance == "inverse_ratio":
        one = Rounded.exact(torch.ones_like(excess.value))
        inverse = (one / (excess + 1.0).clamp(low=config.weight_floor)).where(finite)
        weights = inverse / inverse.sum(0).shaped(lambda t: t.clamp(min=DOUBLE.tiny))
    else:
        weights = Rounded.exact(1.0 / finite.sum(0).clamp(min=1).double().expand(finite.shape))
        if config.balance == "inverse_dt":
            weights = weights / Rounded.exact(o.table["dt"].abs())
    return weights.where(finite)


def loss(given: dict[str, Any], config: Any, factor: float = 1.0) -> Expected:
    """All that :func:`guard_ops.guard_loss` returns, and the gradient of ``factor * loss``.

    Raises:
        UndecidedError: rounding decides what is finite, or whether a step is degenerate.
    """
    whole = Operands(given)
    raw = sums(whole, config.reduction)
    finite = finite_transitions(whole, raw, config)
    if given.get("statistics") is not None:
        finite &= given["statistics"].mean.isfinite().reshape(-1, 1)
    o = whole.without(finite)
    t = raw if bool(finite.all()) else sums(o, config.reduction)
    u = t.log_ratio.expm1()
    unbiased = total(t.log_ratio, t.kl_old)
    if config.ratio_norm == "closed_form":  # the cancellation leaves S1 alone
        unbiased = Rounded(t.log_ratio.value + t.kl_old.value, unbiased.error, DOUBLE)
    mean = Mean(finite)
    norm = ratio_norm(u, unbiased, o, mean, config, given.get("statistics"))
    excess = norm.excess
    weights = balance(o, excess, finite, config)

    a = o.rows["advantages"].clamp(-config.adv_clip, config.adv_clip)
    high, maybe_high = beyond(excess, config.clip_high)
    low, maybe_low = beyond(-excess, config.clip_low)
    clipped = (a > 0) & high | (a < 0) & low
    maybe = (a > 0) & maybe_high | (a < 0) & maybe_low
    advantage = Rounded.exact(a)
    bounded = torch.where(
        clipped, excess.value.clamp(-config.clip_low, config.clip_high), excess.value
    )
    surrogate = -(advantage * (Rounded(bounded, excess.error, DOUBLE) + 1.0))
    drop = config.nonfinite == "drop"
    samples = max(int(finite.any(0).sum()), 1) if drop else o.batch
    count = max(int(finite.sum()), 1) if drop else finite.numel()
    value = (weights * surrogate).where(finite).sum().sum() / float(samples)
    if config.kl_beta:
        value = total(value, config.kl_beta * (t.kl.where(finite).sum().sum() / float(count)))
    if not drop and not bool(finite.all()):
        value = Rounded.exact(math.nan)

    # d loss / d excess, then through what is differentiated of the statistics, then d / d log r
    slope = Rounded(torch.where(clipped, 0.0, -a), torch.where(maybe, a.abs(), 0.0), DOUBLE)
    q = (weights * slope / float(samples)).where(finite)
    if config.ratio_norm == "standardize" and not config.detach_stats:
        center, along = mean(q), mean(q * norm.by_std)
        center, along = (x.shaped(lambda t: t.unsqueeze(-1)) for x in (center, along))
        q = total(q, -center, -(norm.by_std * along)).where(finite)
    d_log_ratio = (q * norm.slope).where(finite)

    out = {"loss": value, "weights": weights, "kl": raw.kl, "log_ratio": raw.log_ratio}
    out["excess"] = excess.where(finite, math.nan)
    out |= metrics(
        t, u, excess, weights, mean, (clipped, maybe), (high, maybe_high), (low, maybe_low)
    )
    out["degenerate"] = Rounded.exact(torch.zeros(o.steps).double() + norm.degenerate)
    kappa = o.table["kappa"] / (o.numel if config.reduction == "mean" else 1)
    scaled = d_log_ratio * Rounded.exact(kappa) * factor
    terms = [(2.0 * scaled, t.e)]
    if config.ratio_norm != "closed_form":
        terms.append((-(2.0 * scaled), t.delta))
    if config.kl_beta:
        assert t.drift is not None
        c3 = config.kl_beta / count * factor / (2 * o.table["s"] ** 2 * o.numel)
        terms.append((2.0 * Rounded.exact(c3), t.drift))
    return out | gradient(o, terms, finite, 0.0 if drop else math.nan)


def finite_transitions(o: Operands, t: Sums, config: Any) -> Tensor:
    """[K, B]: whose ratio, advantage, KL and ``r_hat`` are finite in the result's dtype."""
    advantages = o.rows["advantages"]
    finite = representable(o, t.log_ratio) & advantages.isfinite()
    if "step_weights" in o.rows:
        finite &= o.rows["step_weights"].isfinite()
    log_ratio = t.log_ratio.where(finite)
    checked = [log_ratio.expm1()]
    if config.ratio_norm == "closed_form":
        s = Rounded.exact(o.table["s"])
        checked.append((s * total(log_ratio, t.kl_old.where(finite))).expm1())
    if config.kl_beta:
        checked.append(t.kl)
    return finite & representable(o, *checked)


def metrics(
    t: Sums,
    u: Rounded,
    excess: Rounded,
    weights: Rounded,
    mean: Mean,
    *decisions: tuple[Tensor, Tensor],
) -> Expected:
    def share(mask: Tensor, maybe: Tensor) -> Rounded:
        return mean(Rounded(mask.double(), maybe.double(), DOUBLE))

    clipped, high, low = (share(*each) for each in decisions)
    bias, hat_bias = mean(u), mean(excess)
    return {
        "ratio_bias": bias,
        "ratio_std": mean.std(u, bias),
        "ratio_hat_bias": hat_bias,
        "ratio_hat_std": mean.std(excess, hat_bias),
        "clip_fraction": clipped,
        "clip_fraction_high": high,
        "clip_fraction_low": low,
        "kl_old": mean(t.kl_old),
        "grad_weight": mean(weights),
        "nonfinite": Rounded.exact((~mean.finite).sum(-1).double()),
    }
