import sys

import pytest
import torch

from guard_ops.digits.jobs import SCHEDULE
from guard_ops.digits.judges import Gold, ProxyReward
from guard_ops.digits.policy import (
    GOLD_IMAGES,
    PROXY_IMAGES,
    DigitPolicy,
    load_digits,
    sigmas,
)
from guard_ops.trainer import extras


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def test_all_real_digits_are_there_in_a_fixed_order(digits):
    assert digits.images.shape == (1797, 1, 8, 8)
    assert (float(digits.images.min()), float(digits.images.max())) == (-1.0, 1.0)
    assert digits.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert torch.equal(load_digits().labels, digits.labels)
    # shuffled: the proxy's few images are of all classes
    assert digits.labels[:PROXY_IMAGES].bincount(minlength=10).min() >= 10


def test_sigmas_are_shifted_and_reach_from_noise_to_image():
    assert sigmas(4, shift=1.0) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert sigmas(2, shift=3.0) == [1.0, 0.75, 0.0]
    assert len(SCHEDULE) == 10


def test_the_policy_has_about_600_thousand_parameters_and_starts_at_zero():
    policy = DigitPolicy()
    assert 550_000 < sum(p.numel() for p in policy.parameters()) < 650_000
    velocity = policy.velocity(torch.randn(3, 1, 8, 8), torch.rand(3), {"label": torch.arange(3)})
    # the last layer's weights are 0, its bias at most 1/16
    assert velocity.shape == (3, 1, 8, 8)
    assert velocity.abs().max() <= 1 / 16


def test_the_proxy_is_weak_and_blind_to_the_lower_half(digits):
    proxy = ProxyReward(digits)
    assert 0.6 < proxy.accuracy < 0.85
    changed = digits.images.clone()
    changed[:, :, 4:] = torch.randn_like(changed[:, :, 4:])
    assert torch.equal(proxy(changed, digits.labels), proxy(digits.images, digits.labels))
    brighter = torch.where(digits.images == 1, 9.0, digits.images)  # no whiter than white
    assert torch.equal(proxy(brighter, digits.labels), proxy(digits.images, digits.labels))


def test_gold_tells_digits_from_noise_and_collapse(digits):
    gold = Gold(digits)
    assert gold.accuracy > 0.93
    held_out = slice(PROXY_IMAGES + GOLD_IMAGES, None)
    images, labels = digits.images[held_out], digits.labels[held_out]
    real = gold(images, labels)
    wrong = gold(images, (labels + 1) % 10)
    noise = gold(torch.randn(images.shape, generator=torch.Generator().manual_seed(0)), labels)
    assert real["gold"] > 0.9 > 0.1 > wrong["gold"]
    assert real["distance"] == pytest.approx(0, abs=1e-3)  # they are real images
    assert noise["gold"] < 0.3
    assert noise["distance"] > 5
    one_each = torch.stack([images[labels == c][0] for c in range(10)]).repeat(5, 1, 1, 1)
    collapsed = gold(one_each, torch.arange(10).repeat(5))
    assert collapsed["diversity"] == pytest.approx(0, abs=1e-3)
    assert collapsed["frechet"] > 2 * real["frechet"]


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "sklearn.datasets", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "guard-ops\[demo\]"'):
        load_digits()
    with pytest.raises(ModuleNotFoundError, match="there_is_no_such is not installed"):
        extras.require("there_is_no_such.part", "train")
