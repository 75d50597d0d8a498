"""RatioNorm, clip and balance against hand-computed numbers."""

import math

import pytest
import torch
from problems import schedule

import guard_ops as go

INF, NAN = math.inf, math.nan


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def log_ratio_of(*u):
    """log r of the ratios 1 + u."""
    return torch.log1p(rows(*u))


def close(got, *expected):
    torch.testing.assert_close(got, rows(*expected), rtol=1e-12, atol=1e-15, equal_nan=True)


# ---- ratio_norm ---------------------------------------------------------------------------------


def test_none_is_the_ratio_itself():
    excess = go.ratio_norm(log_ratio_of([0.5, -0.2]), config=go.GuardConfig("none"))
    close(excess, [0.5, -0.2])


def test_standardize_by_hand():
    """u = 1, 3, 5, 7 (in hundredths): mean 4, variance 5."""
    log_ratio = log_ratio_of([0.01, 0.03, 0.05, 0.07], [0.0, 0.2, 0.0, 0.2])
    unit = 1 / math.sqrt(5)
    excess = go.ratio_norm(log_ratio, config=go.GuardConfig())
    close(excess, [-3 * unit, -unit, unit, 3 * unit], [-1, 1, -1, 1])
    excess = go.ratio_norm(log_ratio, config=go.GuardConfig(target_std=0.05))
    close(excess, [-0.15 * unit, -0.05 * unit, 0.05 * unit, 0.15 * unit], [-0.05, 0.05] * 2)
    close(go.ratio_norm(log_ratio[0], config=go.GuardConfig()), *[n * unit for n in (-3, -1, 1, 3)])


def test_a_degenerate_step_is_centred_but_not_blown_up():
    """Spread at or under std_floor: r_hat = 1 + u - mean(u), whatever target_std is."""
    for target in (1.0, 0.05):
        config = go.GuardConfig(std_floor=0.1, target_std=target)
        close(go.ratio_norm(log_ratio_of([0.03, -0.05, 0.05]), config=config), [0.02, -0.06, 0.04])
    log_ratio = log_ratio_of([0.0, 1e-9, 2e-9])
    close(go.ratio_norm(log_ratio, config=go.GuardConfig()), [-1e-9, 0, 1e-9])
    close(go.ratio_norm(torch.zeros(1, 3).double(), config=go.GuardConfig(std_floor=0)), [0, 0, 0])


def test_the_floor_itself_is_degenerate():
    log_ratio = log_ratio_of([-0.5, 0.5])  # std exactly 0.5
    close(go.ratio_norm(log_ratio, config=go.GuardConfig(std_floor=0.5)), [-0.5, 0.5])
    close(go.ratio_norm(log_ratio, config=go.GuardConfig(std_floor=0.49)), [-1, 1])


def test_closed_form_by_hand():
    """Equation 8: log r_hat = s (log r + kl_old), s per step."""
    coeffs = schedule()[1:3]
    log_ratio, kl_old = rows([0.1, -0.3], [0.2, 0.0]), rows([0.05, 0.02], [0.01, 0.03])
    config = go.GuardConfig.paper()
    excess = go.ratio_norm(log_ratio, config=config, coeffs=coeffs, kl_old=kl_old)
    expected = torch.exp(coeffs.s[:, None] * (log_ratio + kl_old)) - 1
    torch.testing.assert_close(excess, expected, rtol=1e-12, atol=1e-16)
    one = go.ratio_norm(log_ratio[0], config=config, coeffs=schedule()[1], kl_old=kl_old[0])
    assert torch.equal(one, excess[0])


def test_what_is_not_finite_is_left_out_of_ratio_norm():
    log_ratio = log_ratio_of([0.01, NAN, 0.03], [NAN, NAN, NAN], [0.1, 0.1, 0.3])
    log_ratio[0, 1] = INF
    excess = go.ratio_norm(log_ratio, config=go.GuardConfig())
    unit = 1 / math.sqrt(2)
    close(excess, [-1, NAN, 1], [NAN, NAN, NAN], [-unit, -unit, 2 * unit])


def test_statistics_from_elsewhere():
    statistics = go.RatioStatistics(1).update(log_ratio_of([0.0, 0.2]))  # mean 0.1, std 0.1
    config = go.GuardConfig()
    excess = go.ratio_norm(log_ratio_of([0.1, 0.4]), config=config, statistics=statistics)
    close(excess, [0, 3])


# ---- clipped_surrogate --------------------------------------------------------------------------


def test_the_clip_by_hand():
    """max(-A r, -A clip(r, 0.9, 1.2)) at r = 0.8, 1, 1.3 for A = 2 and A = -2."""
    config = go.GuardConfig("none", clip_low=0.1, clip_high=0.2)
    excess = rows([-0.2, 0.0, 0.3], [-0.2, 0.0, 0.3])
    advantages = rows([2.0, 2, 2], [-2, -2, -2])
    losses = go.clipped_surrogate(excess, advantages, config=config)
    close(losses, [-1.6, -2.0, -2.4], [1.8, 2.0, 2.6])
    gradient = torch.func.grad(lambda x: go.clipped_surrogate(x, advantages, config=config).sum())(
        excess
    )
    close(gradient, [-2.0, -2, 0], [0, 2, 2])


def test_advantages_are_clamped_and_broadcast_over_steps():
    config = go.GuardConfig(adv_clip=1.5, clip_low=INF, clip_high=INF)
    losses = go.clipped_surrogate(rows([0.0, 0, 0], [1, 1, 1]), rows(3.0, -4, 0.5), config=config)
    close(losses, [-1.5, 1.5, -0.5], [-3, 3, -1])


def test_an_infinite_clip_never_binds_and_a_zero_one_always_does():
    excess, advantages = rows([-0.9, 5.0]), rows(1.0, 1.0)
    never = go.GuardConfig(clip_low=INF, clip_high=INF)
    close(go.clipped_surrogate(excess, advantages, config=never), [-0.1, -6])
    always = go.GuardConfig(clip_low=0, clip_high=0)
    close(go.clipped_surrogate(excess, advantages, config=always), [-0.1, -1])


def test_the_clip_compares_differences():
    """A bound of 2e-6 in float32: 1 + excess would round both sides to the same number."""
    config = go.GuardConfig("none", clip_low=2e-6, clip_high=2e-6)
    excess = torch.tensor([[1.9999e-6, 2.0001e-6]], requires_grad=True)
    go.clipped_surrogate(excess, torch.ones(2), config=config).sum().backward()
    assert excess.grad.tolist() == [[-1.0, 0.0]]


# ---- balance_weights ----------------------------------------------------------------------------


def test_inverse_ratio_by_hand():
    """r_hat = 1, 2, 4 over one sample's steps: 1/r = 1, 1/2, 1/4 of 7/4."""
    config = go.GuardConfig(balance="inverse_ratio")
    weights = go.balance_weights(rows([0.0], [1], [3]), config=config)
    close(weights, [4 / 7], [2 / 7], [1 / 7])
    # r_hat = -0.5 and 0.05 are floored to 0.1: 10, 10, 1.
    weights = go.balance_weights(rows([-1.5], [-0.95], [0]), config=config)
    close(weights, [10 / 21], [10 / 21], [1 / 21])
    weights = go.balance_weights(
        rows([-1.5], [0]), config=go.GuardConfig(balance="inverse_ratio", weight_floor=0.5)
    )
    close(weights, [2 / 3], [1 / 3])


def test_inverse_dt_by_hand():
    coeffs = go.SdeSchedule([1.0, 0.75, 0.25])[:]  # |dt| = 1/4, 1/2
    weights = go.balance_weights(
        torch.zeros(2, 3), config=go.GuardConfig(balance="inverse_dt"), coeffs=coeffs
    )
    assert weights.tolist() == [[2.0] * 3, [1.0] * 3]


def test_no_balance_is_the_mean_over_the_finite_steps():
    excess = rows([0.1, NAN, NAN], [0.2, 0.3, NAN])
    close(go.balance_weights(excess, config=go.GuardConfig()), [0.5, 0, 0], [0.5, 1, 0])
    config = go.GuardConfig(balance="inverse_ratio")
    close(go.balance_weights(excess, config=config)[:, 1:], [0, 0], [1, 0])


@pytest.mark.parametrize("balance", ["none", "inverse_dt"])
def test_the_weights_of_one_step(balance):
    """[B] is one step of B samples, not B steps: each sample's only weight."""
    config = go.GuardConfig(balance=balance)
    coeffs = schedule()[2]
    weights = go.balance_weights(rows(0.1, -0.3, 0.5, 2.0), config=config, coeffs=coeffs)
    one = 1 / abs(coeffs.dt.item()) if balance == "inverse_dt" else 1.0
    close(weights, one, one, one, one)


def test_one_step_has_no_others_to_weigh_it_against():
    for excess in (torch.zeros(4), torch.zeros(1, 4)):
        with pytest.raises(ValueError, match=r"`config\.balance` is inverse_ratio.* all K steps"):
            go.balance_weights(excess, config=go.GuardConfig.article())
