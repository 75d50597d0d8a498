"""Several rewards: their weighted sum, and advantages of each."""

from __future__ import annotations

import pytest
import torch

from guard_ops.rewards import Combined, load_reward
from guard_ops.trainer import Scores

PIXELS = torch.rand(4, 3, 8, 8)
ASKED = PIXELS, ["a"] * 4, [{}] * 4


def bright(pixels, prompts, metadata):
    return pixels.flatten(1).mean(1)


def two(pixels, prompts, metadata):
    return Scores(torch.ones(4), {"exact": torch.tensor([1.0, 0, 1, float("nan")])})


def test_a_weighted_sum_with_every_part():
    found = Combined({"bright": bright, "two": two}, [0.5, -2.0])(*ASKED)
    torch.testing.assert_close(found.total, 0.5 * bright(*ASKED).double() - 2)
    assert list(found.parts) == ["bright", "two", "two/exact"]
    assert found.parts["two/exact"].isnan().tolist() == [False, False, False, True]


def test_only_separate_advantages_have_weights():
    assert not hasattr(Combined({"a": bright, "b": two}), "advantage_weights")
    combined = Combined({"a": bright, "b": two}, [1, 3], "separate")
    assert combined.advantage_weights == {"a": 1.0, "b": 3.0}


def test_each_is_told_to_fetch_and_prepare():
    class Model:
        said = ()

        def fetch(self):
            self.said += ("fetch",)

        def prepare(self, device):
            self.said += (device,)

        def check_prompts(self, prompts, metadata):
            self.said += (prompts,)

        __call__ = staticmethod(bright)

    model = Model()
    combined = Combined({"a": model, "b": bright})
    combined.fetch()
    combined.prepare("cpu")
    combined.check_prompts(["a"], [{}])
    assert model.said == ("fetch", "cpu", ["a"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (({"a": bright},), "`reward` has 1 rewards to combine; it needs 2 or more"),
        (({"a": bright, "b": two}, [1]), "`reward_weights` has 1 numbers for the 2 rewards a, b"),
        (({"a": bright, "b": two}, [1, float("nan")]), "it needs finite numbers, not all 0"),
        (({"a": bright, "b": two}, [0, 0]), "it needs finite numbers, not all 0"),
        (({"a": bright, "b": two}, None, "each"), "`reward_advantages` is 'each'; it needs summed"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Combined(*arguments)


def test_a_reward_of_another_length_is_named():
    combined = Combined({"a": bright, "short": lambda *_: torch.ones(3)})
    with pytest.raises(ValueError, match=r"short returned torch.Size\(\[3\]\) for 4 samples"):
        combined(*ASKED)


def test_names_with_a_plus_between_them():
    combined = load_reward("jpeg_size + torch:numel", [], [1.0, 2.0], "separate")
    assert combined.weights == {"jpeg_size": 1.0, "torch:numel": 2.0}
    with pytest.raises(ValueError, match="which has one reward twice"):
        load_reward("jpeg_size+jpeg_size")
    with pytest.raises(ValueError, match="'separate'; the one reward 'jpeg_size' needs summed"):
        load_reward("jpeg_size", advantages="separate")
    with pytest.raises(ValueError, match=r"has 'geneval\.clip=x', but `reward` is jpeg_size"):
        load_reward("jpeg_size", ["geneval.clip=x"])
    with pytest.raises(ValueError, match=r"has 'quality'; it needs name\.key=value"):
        load_reward("jpeg_size", ["quality"])
