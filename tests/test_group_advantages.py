"""GRPO's advantages against hand-computed numbers."""

import math
import re

import pytest
import torch
from problems import problem, run
from torch.utils._python_dispatch import TorchDispatchMode

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


def test_sixteen_thousand_samples_are_compared_within_their_groups_alone():
    """The old way compared every pair: 256 million of them. Groups of 8, against a plain mean."""
    torch.manual_seed(0)
    rewards = torch.randn(2000, 8, dtype=torch.float64)
    order = torch.randperm(16000)
    groups = torch.arange(2000).repeat_interleave(8) * 7 - 300
    got = go.group_advantages(rewards.flatten()[order], groups[order])
    centred = rewards - rewards.mean(1, keepdim=True)
    expected = centred / (rewards.std(1, correction=0, keepdim=True) + 1e-4)
    torch.testing.assert_close(got, expected.flatten()[order], rtol=1e-12, atol=1e-14)


def test_memory_and_time_are_linear_in_the_samples():
    """No tensor that is made on the way is larger than a few times the batch."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                largest = max(largest, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    with Watch():
        go.group_advantages(torch.randn(1000), torch.arange(1000) % 50)
    assert largest <= 1001


def test_groups_without_spread_can_be_left_out_of_the_loss():
    """Then the loss is the mean over the other samples, as if these had not been drawn."""
    rewards = torch.tensor([0.1, 0.1, 1.0, 3.0]).double()
    groups = torch.tensor([5, 5, 2, 2])
    advantages = go.group_advantages(rewards, groups, without_spread="nan")
    assert advantages.isnan().tolist() == [True, True, False, False]
    assert go.group_advantages(rewards, groups).tolist()[:2] == [0.0, 0.0]
    given = problem("velocity", batch=4)
    config = go.GuardConfig.article(nonfinite="drop")
    out, grad = run({**given, "advantages": advantages}, config)
    rest = {n: x if n in ("coeffs", "advantages") else x[:, 2:] for n, x in given.items()}
    expected, expected_grad = run({**rest, "advantages": advantages[2:]}, config)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    torch.testing.assert_close(grad[:, 2:], expected_grad, rtol=1e-10, atol=1e-14)
    assert torch.equal(grad[:, :2], torch.zeros_like(grad[:, :2]))


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_rewards_of_any_size_have_advantages(size):
    rewards = REWARDS * size
    close(
        go.group_advantages(rewards, GROUPS, eps=0.0),
        [-1, 0, 1, -math.sqrt(1.5), math.sqrt(1.5), 0],
    )
    close(go.group_advantages(rewards, GROUPS, scale="none") / size, [-1, 0, 1, -5, 5, 0])


@pytest.mark.parametrize(
    "given, exception, message",
    [
        ({"eps": math.nan}, ValueError, "`eps` is nan; it needs >= 0 and finite"),
        ({"eps": -1.0}, ValueError, "`eps` is -1.0; it needs >= 0 and finite"),
        ({"eps": "0"}, TypeError, "`eps` is '0' (str); it needs a number"),
        ({"scale": ["group"]}, ValueError, "`scale` is a list; it needs one of group, batch, none"),
        (
            {"without_spread": "drop"},
            ValueError,
            "`without_spread` is 'drop'; it needs one of zero",
        ),
        ({"process_group": "all"}, TypeError, "`process_group` is a str; it needs a torch.distri"),
    ],
)
def test_bad_settings(given, exception, message):
    with pytest.raises(exception, match=re.escape(message)):
        go.group_advantages(REWARDS, GROUPS, **given)


def test_one_prompt_s_enormous_rewards_are_nothing_to_another():
    rewards = torch.tensor([1e200, 3e200, 1.0, 3.0], dtype=torch.float64)
    got = go.group_advantages(rewards, torch.tensor([0, 0, 1, 1]))
    close(got, [-1.0, 1.0, -1 / (1 + 1e-4), 1 / (1 + 1e-4)])
