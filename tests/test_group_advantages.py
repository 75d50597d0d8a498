"""GRPO's advantages against hand-computed numbers."""

import math
import re

import pytest
import torch

import guard_ops as go

REWARDS = torch.tensor([1.0, 5.0, 3.0, 0.0, 10.0, 4.0], dtype=torch.float64)
GROUPS = torch.tensor([7, 3, 7, 3, 3, 9])  # prompts 7: 1, 3; 3: 5, 0, 10; 9: 4


def close(got, expected):
    expected = torch.tensor(expected, dtype=got.dtype)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15, equal_nan=True)


def test_by_group():
    root = math.sqrt(50 / 3)  # variance of 0, 5, 10
    small = 1 / (1 + 1e-4)
    large = 5 / (root + 1e-4)
    close(go.group_advantages(REWARDS, GROUPS), [-small, 0, small, -large, large, 0])


def test_by_batch_and_unscaled():
    std = REWARDS.std(correction=0).item()
    centred = [-1.0, 0.0, 1.0, -5.0, 5.0, 0.0]
    close(go.group_advantages(REWARDS, GROUPS, scale="none"), centred)
    expected = [x / (std + 0.5) for x in centred]
    close(go.group_advantages(REWARDS, GROUPS, scale="batch", eps=0.5), expected)


def test_without_groups_the_batch_is_one():
    mean, std = REWARDS.mean().item(), REWARDS.std(correction=0).item()
    expected = [(x - mean) / (std + 1e-4) for x in REWARDS.tolist()]
    close(go.group_advantages(REWARDS), expected)
    close(go.group_advantages(REWARDS, torch.zeros(6, dtype=torch.int64)), expected)


def test_a_prompt_whose_samples_score_alike_teaches_nothing():
    close(go.group_advantages(torch.full((4,), 0.3).double()), [0.0] * 4)


def test_a_reward_that_is_not_finite_is_left_out_of_its_group():
    rewards = REWARDS.clone()
    rewards[3], rewards[5] = math.nan, math.inf
    half = 2.5 / (2.5 + 1e-4)
    small = 1 / (1 + 1e-4)
    expected = [-small, -half, small, math.nan, half, math.nan]
    close(go.group_advantages(rewards, GROUPS), expected)


def test_the_dtype_is_the_rewards():
    for dtype in (torch.float32, torch.bfloat16):
        got = go.group_advantages(REWARDS.to(dtype), GROUPS)
        assert got.dtype == dtype
        expected = go.group_advantages(REWARDS, GROUPS).to(dtype)
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=0)


def test_large_rewards_close_together_keep_their_digits():
    """Float32 rewards of 1e4 that differ by 0.01: centred in float64, not by E[x^2] - E[x]^2."""
    rewards = torch.tensor([10000.0, 10000.01, 10000.02])
    exact = rewards.double() - rewards.double().mean()
    expected = exact / exact.std(correction=0)
    got = go.group_advantages(rewards, eps=0.0)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "arguments, exception, message",
    [
        (
            (torch.tensor([1, 2]),),
            TypeError,
            "`rewards` has dtype torch.int64; it needs float64, float32",
        ),
        (([1.0, 2.0],), TypeError, "`rewards` is a list; it needs a tensor"),
        ((torch.zeros(2, 3),), ValueError, "`rewards` has shape (2, 3); it needs [B], B > 0"),
        ((torch.zeros(0),), ValueError, "`rewards` has shape (0,); it needs [B], B > 0"),
        (
            (torch.zeros(2), torch.zeros(3, dtype=torch.int64)),
            ValueError,
            "`groups` is a torch.int64 tensor of shape (3,); it needs torch.int64 of shape (2,)",
        ),
        (
            (torch.zeros(2), torch.zeros(2)),
            ValueError,
            "`groups` is a torch.float32 tensor of shape (2,); it needs torch.int64 of shape (2,)",
        ),
        ((torch.zeros(2), [0, 1]), TypeError, "`groups` is a list; it needs a tensor"),
    ],
)
def test_bad_arguments(arguments, exception, message):
    with pytest.raises(exception, match=re.escape(message)):
        go.group_advantages(*arguments)


def test_bad_scale():
    with pytest.raises(ValueError, match="`scale` is 'std'; it needs one of group, batch, none"):
        go.group_advantages(REWARDS, scale="std")
