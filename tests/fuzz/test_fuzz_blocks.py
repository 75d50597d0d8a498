"""ratio_norm, balance_weights, clipped_surrogate, group_advantages, RatioStatistics: [K, B]."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import strategies
import torch
import truth
import truth_loss
from compare import differences, mismatch
from hypothesis import given
from hypothesis import strategies as st
from rounding import DOUBLE, Rounded, format_of
from tally import examples, tally

import guard_ops as go

DTYPES = (torch.float64, torch.float32)


@st.composite
def log_ratios(draw):
    """[K, B], some of them large, some not finite."""
    shape = (draw(st.sampled_from((1, 2, 5))), draw(st.sampled_from((1, 2, 3, 8, 40))))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from((1e-6, 1e-2, 1.0, 20.0)))
    x = spread * torch.randn(shape, generator=random, dtype=torch.float64)
    for bad in draw(
        st.lists(st.sampled_from((math.nan, math.inf, -math.inf, 95.0, 400.0, 690.0)), max_size=2)
    ):
        x[tuple(draw(st.integers(0, n - 1)) for n in shape)] = bad
    return x.to(draw(st.sampled_from(DTYPES)))


def scalar_truth(log_ratio, config, kl_old, coeffs, statistics=None):
    """``r_hat - 1`` of numbers in whose dtype nothing may overflow unnoticed."""
    o = SimpleNamespace(result=log_ratio.dtype)
    exact = Rounded.exact(log_ratio.double())
    finite = truth.representable(o, exact)
    u = exact.where(finite).expm1()
    finite &= truth.representable(o, u)
    u = u.where(finite)
    unbiased = Rounded.exact((log_ratio.double() + kl_old.double()).where(finite, torch.zeros(())))
    o.steps, o.table = len(log_ratio), {"s": coeffs.s.unsqueeze(-1).expand(log_ratio.shape)}
    norm = truth_loss.ratio_norm(u, unbiased, o, truth_loss.Mean(finite), config, statistics)
    finite &= truth.representable(o, norm.excess)
    return norm.excess.where(finite, math.nan), finite


@examples(share=0.05)
@given(
    log_ratio=log_ratios(),
    norm=st.sampled_from(("none", "standardize", "closed_form")),
    target_std=st.sampled_from((1.0, 0.3)),
)
def test_ratio_norm_is_the_truth(log_ratio, norm, target_std):
    config = go.GuardConfig(norm, target_std=target_std, std_floor=1e-8)
    coeffs = go.SdeSchedule((0.9, 0.7, 0.5, 0.3, 0.2, 0.1))[: log_ratio.shape[0]]
    kl_old = torch.full_like(log_ratio, 0.01)
    try:
        expected, _ = scalar_truth(log_ratio, config, kl_old, coeffs)
    except truth.UndecidedError:
        return tally("ratio_norm", "torch", decided=False)
    got = go.ratio_norm(log_ratio, config=config, coeffs=coeffs, kl_old=kl_old)
    wrong = mismatch("excess", got, expected)
    assert not wrong, wrong
    return tally("ratio_norm", "torch")


@examples(share=0.035)
@given(log_ratio=log_ratios(), cuts=st.lists(st.integers(0, 40), max_size=4), order=st.randoms())
def test_statistics_are_those_of_all_samples_however_they_come(log_ratio, cuts, order):
    """Welford's merge is associative and commutative up to rounding."""
    steps, batch = log_ratio.shape
    o = SimpleNamespace(result=log_ratio.dtype)
    exact = Rounded.exact(log_ratio.double())
    try:
        finite = truth.representable(o, exact)
        u = exact.where(finite).expm1()
        finite &= truth.representable(o, u)
    except truth.UndecidedError:
        return tally("RatioStatistics", "torch", decided=False)
    u = u.where(finite)
    mean = truth_loss.Mean(finite)
    center = mean(u)
    # parts are merged through differences of their means, each rounded once more
    rounds = 4 + 2 * len(cuts)
    largest = torch.where(finite, u.value.abs(), 0.0).amax(-1)
    known = mean.count > 0
    error = center.error + rounds * DOUBLE.unit * largest
    center = Rounded(torch.where(known, center.value, 0.0), torch.where(known, error, 0.0), DOUBLE)
    spread = mean.std(u, center)
    spread = Rounded(
        torch.where(known, spread.value, 0.0),
        torch.where(known, spread.error + rounds * DOUBLE.unit * largest, 0.0),
        DOUBLE,
    )
    edges = [0, *sorted(c for c in set(cuts) if 0 < c < batch), batch]
    parts = [log_ratio[:, a:b] for a, b in itertools.pairwise(edges)]
    together = go.RatioStatistics(steps)
    for part in parts:
        together.update(part)
    order.shuffle(parts)
    left = go.RatioStatistics(steps)
    for part in parts:  # a tree of another shape and order
        left = go.RatioStatistics(steps).update(part).merge(left)
    for statistics in (together, left):
        got = {"count": statistics.count, "mean": statistics.mean, "std": statistics.std}
        expected = {"count": Rounded.exact(mean.count), "mean": center, "std": spread}
        wrong = differences(got, expected)
        assert not wrong, wrong
    return tally("RatioStatistics", "torch")


@examples(share=0.02)
@given(log_ratio=log_ratios(), config=st.builds(
    go.GuardConfig,
    ratio_norm=st.just("none"),
    balance=st.sampled_from(("none", "inverse_ratio", "inverse_dt")),
    weight_floor=st.sampled_from((0.1, 0.9)),
    clip_low=st.sampled_from((0.2, 2e-6, 0.0, math.inf)),
    clip_high=st.sampled_from((0.2, 2e-6, 0.0, math.inf)),
    adv_clip=st.sampled_from((5.0, 0.5, math.inf)),
))  # fmt: skip
def test_weights_and_surrogate_are_the_truth(log_ratio, config):
    excess = log_ratio.clamp(-1.0, 1e30)
    if config.balance == "inverse_ratio" and len(excess) == 1:
        with pytest.raises(ValueError, match=r"`config\.balance` is inverse_ratio"):
            go.balance_weights(excess, config=config)
        config = dataclasses.replace(config, balance="none")
    coeffs = go.SdeSchedule((0.9, 0.7, 0.5, 0.3, 0.2, 0.1))[: excess.shape[0]]
    dt = coeffs.dt.unsqueeze(-1).expand(excess.shape)
    finite = excess.isfinite()
    o = SimpleNamespace(rows={}, table={"dt": dt})
    number = Rounded.exact(torch.where(finite, excess.double(), 0.0))
    weights = truth_loss.balance(o, number, finite, config)
    wrong = mismatch("weights", go.balance_weights(excess, config=config, coeffs=coeffs), weights)
    assert not wrong, wrong
    advantages = torch.linspace(-7, 7, excess.shape[1]).to(excess.dtype)
    got = go.clipped_surrogate(excess, advantages, config=config)
    a = advantages.double().clamp(-config.adv_clip, config.adv_clip)
    ratio = 1 + excess.double()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    value = torch.maximum(-a * ratio, -a * clipped)
    error = 4 * DOUBLE.unit * a.abs() * (1 + ratio.abs() + min(config.clip_high, 1e30))
    error = torch.where(finite, error, math.inf)
    wrong = mismatch("surrogate", got, Rounded(value, error, DOUBLE))
    assert not wrong, wrong
    tally("balance_weights, clipped_surrogate", "torch")


def mean_and_std(values):
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / len(values))


@examples(share=0.03)
@given(
    size=st.sampled_from((1, 2, 3, 17, 64)),
    prompts=st.sampled_from((1, 2, 5, 64)),
    scale=st.sampled_from(("group", "batch", "none")),
    eps=st.sampled_from((1e-4, 1e-8, 1.0)),
    unit=st.sampled_from((1.0, 1e-6, 1e3)),
    offset=st.sampled_from((0.0, 10.0)),
    bad=st.sampled_from((None, *strategies.BAD)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_group_advantages_are_the_truth(size, prompts, scale, eps, unit, offset, bad, dtype, seed):
    draw = torch.Generator().manual_seed(seed)
    rewards = (offset + unit * torch.randn(size, generator=draw, dtype=torch.float64)).to(dtype)
    groups = torch.randint(prompts, (size,), generator=draw) * 1000 - 7  # any int64 is a name
    if bad is not None:
        rewards[seed % size] = bad
    numbers, names = rewards.tolist(), groups.tolist()
    whole = [x for x in numbers if math.isfinite(x)]
    expected = []
    for x, name in zip(numbers, names, strict=True):
        mates = [y for y, g in zip(numbers, names, strict=True) if g == name and math.isfinite(y)]
        width = {"group": mates, "batch": whole, "none": None}[scale]
        if math.isfinite(x):
            mean, _ = mean_and_std(mates)
            expected.append((x - mean) / (1.0 if width is None else mean_and_std(width)[1] + eps))
        else:
            expected.append(math.nan)
    largest = max((abs(x) for x in whole), default=0.0)
    value = torch.tensor(expected, dtype=torch.float64)
    floor = 1.0 if scale == "none" else eps
    # x - mean is rounded at the size of the rewards, and so is the std that divides it
    rounding = 8 * size * DOUBLE.unit * largest
    error = rounding * (1 + value.abs()) / floor
    got = go.group_advantages(rewards, groups, scale=scale, eps=eps)
    wrong = mismatch("advantages", got, Rounded(value, torch.nan_to_num(error), format_of(dtype)))
    assert not wrong, wrong
    tally("group_advantages", "torch")
