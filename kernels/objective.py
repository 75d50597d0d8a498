"""The objective's formulas, those of ``guard_ops/objective.py``, on float64 of any shape.

Names and order are those of ``csrc/objective.h``, which does the same in C++. The choices and the
numbers of an objective are read from ``guard_ops/config.py``.
"""

import struct
from typing import Any

import triton
import triton.language as tl

from ..config import CHOICES, FLAGS, OBJECTIVE_NUMBERS, NormNeeds, Objective
from .expm1 import expm1
from .transition import group


def _choice(name: str, value: str) -> tl.constexpr:
    return tl.constexpr(CHOICES[name].index(value))


NONE = _choice("ratio_norm", "none")
STANDARDIZE = _choice("ratio_norm", "standardize")
CLOSED_FORM = _choice("ratio_norm", "closed_form")
INVERSE_RATIO = _choice("balance", "inverse_ratio")
INVERSE_DT = _choice("balance", "inverse_dt")
MEAN = _choice("reduction", "mean")
DROP = _choice("nonfinite", "drop")

# The choices of an objective, each a tl.constexpr, as kernels are compiled for them. `kl` says
# whether the loss has a KL term.
Mode = group("Mode", (*CHOICES, *FLAGS, "kl", *NormNeeds._fields))
# The numbers of an objective, each as three float32 (`words`).
Numbers = group("Numbers", OBJECTIVE_NUMBERS)


def mode_of(objective: Objective) -> Any:
    """The part of an objective that kernels are compiled for."""
    kl = objective.named()["kl_beta"] != 0
    values = (*objective.choices, kl, *objective.needs())
    return Mode._make(tl.constexpr(int(value)) for value in values)


def numbers_of(objective: Objective) -> Any:
    """The part of an objective that kernels take at each call."""
    return Numbers._make(map(words, objective.numbers))


def words(value: float) -> tuple[float, float, float]:
    """The 64 bits of a float64 as three whole numbers, each of which a float32 represents exactly.

    Triton passes a Python float as float32, and cannot be told otherwise in a tuple. For integers
    it would compile anew. A buffer on the device would have to be filled by a copy, for which the
    host would wait.
    """
    (bits,) = struct.unpack("<Q", struct.pack("<d", value))
    mask = (1 << 22) - 1
    return float(bits & mask), float(bits >> 22 & mask), float(bits >> 44)


@triton.jit
def number(of):
    """The float64 whose :func:`words` these are."""
    low = tl.full((), of[0], tl.float32).to(tl.int64)
    middle = tl.full((), of[1], tl.float32).to(tl.int64)
    high = tl.full((), of[2], tl.float32).to(tl.int64)
    return (low | (middle << 22) | (high << 44)).to(tl.float64, bitcast=True)


LOG_SQRT_2PI = tl.constexpr(0.91893853320467274178)
LARGEST = tl.constexpr(1.7976931348623157e308)
LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)


@triton.jit
def is_finite(x):
    return tl.abs(x) <= LARGEST


@triton.jit
def fits(x, WIDE: tl.constexpr):
    """Whether a result can represent x. What it cannot represent counts as not finite.

    WIDE: whether results are float64, else float32.
    """
    return tl.abs(x) <= (LARGEST if WIDE else LARGEST_FLOAT)


@triton.jit
def scale_of(kappa, numel, mode):
    return kappa / numel if mode.reduction == MEAN else kappa


@triton.jit
def rounding_gain(b, s, kappa, numel, mode):
    """Relative to their size, what independent errors of the velocities put on ``log r``."""
    return 2 * scale_of(kappa, numel, mode) * s * tl.abs(b) * tl.sqrt(numel)


@triton.jit
def std_floor_of(square, numbers):
    """The floor of a step; ``square``: the mean over its samples of the squared gain, maybe inf."""
    rounding = number(numbers.rounding)
    target_std, least = number(numbers.target_std), number(numbers.std_floor)
    rounding = tl.where(rounding == 0, 0.0, rounding * tl.sqrt(square))
    rounding = tl.where(rounding < target_std, rounding, target_std)
    return tl.where(least > rounding, least, rounding)


@triton.jit
def normalize(log_ratio, kl_old, u, s, mean, std, floor, numbers, mode):
    """RatioNorm of a finite transition; only this function tells one norm from another.

    Returns ``excess = r_hat - 1``; ``outer`` and ``inner``, whose product is the derivative of the
    excess by ``log_ratio`` (by ``log_ratio + kl_old`` for a debiased norm) with the statistics held
    constant; and ``by_std``. A norm that needs statistics is ``outer (u - mean)``, so that its
    derivative by the mean is ``-outer``; by the std it is ``-outer by_std``.
    """
    by_std = tl.zeros_like(u)
    if mode.ratio_norm == CLOSED_FORM:
        excess = expm1(s * (log_ratio + kl_old))
        outer, inner = 1.0 + excess, s
    elif mode.ratio_norm == STANDARDIZE:
        target_std = number(numbers.target_std)
        spread = (std <= floor) == 0  # also if the std is NaN
        denominator = tl.where(spread, std, target_std)
        excess = target_std * ((u - mean) / denominator)
        outer, inner = target_std / denominator, 1.0 + u
        by_std = tl.where(spread, (u - mean) / std, 0.0)
    else:
        tl.static_assert(mode.ratio_norm == NONE, "normalize lacks this ratio_norm")
        excess = u
        outer, inner = tl.zeros_like(u) + 1.0, 1.0 + u
    return excess, outer, inner, by_std


@triton.jit
def ratio_of(
    s1, s2, ref, advantage, old_log_prob, s, kappa, numel, numbers, mode, WIDE: tl.constexpr
):
    """``log r``, ``kl_old``, the reference model's KL, ``u = expm1(log r)``, and whether finite."""
    scale = scale_of(kappa, numel, mode)
    kl = ref / (2 * s * s * numel)
    if old_log_prob is not None:
        log_prob = -scale * s2
        if mode.gaussian:
            constants = tl.log(s) + LOG_SQRT_2PI
            log_prob = log_prob - (constants if mode.reduction == MEAN else numel * constants)
        log_ratio = log_prob - old_log_prob
        kl_old = tl.zeros_like(log_ratio) + float("nan")
    else:
        log_ratio = scale * (2 * s1 - s2)
        kl_old = scale * s2
    u = expm1(log_ratio)
    finite = fits(log_ratio, WIDE) & fits(u, WIDE) & is_finite(advantage)
    if mode.kl:
        finite = finite & fits(kl, WIDE)
    return log_ratio, kl_old, kl, u, finite


@triton.jit
def inverse_rho(excess, numbers):
    weight_floor = number(numbers.weight_floor)
    rho = 1.0 + excess
    return 1.0 / tl.where(rho < weight_floor, weight_floor, rho)


@triton.jit
def independent_weight(dt, finite_steps, mode):
    """A step's weight by a balance that needs no ratios, if the sample has ``finite_steps``."""
    if mode.balance == INVERSE_DT:
        weight = 1.0 / (finite_steps * tl.abs(dt))
    else:
        weight = 1.0 / finite_steps
    return weight


@triton.jit
def surrogate_of(excess, advantage, numbers):
    """Loss, its slope in ``r_hat``, and whether it is clipped, above the clip, and below it."""
    clip_low, clip_high = number(numbers.clip_low), number(numbers.clip_high)
    adv_clip = number(numbers.adv_clip)
    a = tl.where(advantage < -adv_clip, -adv_clip, advantage)
    a = tl.where(a > adv_clip, adv_clip, a)
    high, low = excess > clip_high, excess < -clip_low
    clipped = ((a > 0) & high) | ((a < 0) & low)
    bounded = tl.where(high, clip_high, tl.where(low, -clip_low, excess))
    loss = -a * (1.0 + tl.where(clipped, bounded, excess))
    return loss, tl.where(clipped, 0.0, -a), clipped, high, low


@triton.jit
def coefficients_of(d_excess, outer, inner, s, kappa, numel, transitions, finite, numbers, mode):
    """``d loss / d (S1, S2, reference sum)``; 0 or NaN for a transition that is not finite.

    ``d_excess``: ``d loss / d r_hat``, less any gradient that goes through the statistics.
    """
    scale = scale_of(kappa, numel, mode)
    d_log_ratio = d_excess * outer * inner
    c1 = d_log_ratio * 2 * scale
    c2 = tl.zeros_like(c1)
    if not mode.debiased:  # S2 cancels in log r + kl_old
        c2 = -d_log_ratio * scale
    c3 = tl.zeros_like(c1)
    if mode.kl:
        c3 = c3 + number(numbers.kl_beta) / transitions / (2 * s * s * numel)
    rest = 0.0 if mode.nonfinite == DROP else float("nan")
    return tl.where(finite, c1, rest), tl.where(finite, c2, rest), tl.where(finite, c3, rest)
