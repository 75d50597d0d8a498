"""Distances of samples, against known values."""

from __future__ import annotations

import math

import pytest
import torch

from guard_ops.monitor import Change, Reference
from guard_ops.monitor.distances import (
    diversity,
    frechet,
    inception_score,
    moments,
    nearest,
    pixels,
)


def test_frechet_distance_of_known_gaussians():
    mean, identity = torch.zeros(3).double(), torch.eye(3).double()
    assert frechet((mean, identity), (mean, identity)) == pytest.approx(0, abs=1e-9)
    assert frechet((mean, identity), (mean + 2, identity)) == pytest.approx(12)
    # commuting covariances: sum of (sqrt(a) - sqrt(b))^2
    assert frechet((mean, 4 * identity), (mean, 9 * identity)) == pytest.approx(3)
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    assert moments(x)[1] == pytest.approx(identity, abs=0.2)


def test_inception_score_is_1_for_one_class_and_their_number_for_all():
    sure = 50 * torch.eye(5)
    assert inception_score(sure) == pytest.approx(5)
    assert inception_score(sure[:1].repeat(5, 1)) == pytest.approx(1)
    assert inception_score(torch.zeros(7, 5)) == pytest.approx(1)
    p = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    kl = (p * (p / p.mean(0)).log()).sum(1).mean()
    assert inception_score(p.log()) == pytest.approx(math.exp(float(kl)))


def test_diversity_is_within_a_prompt():
    x = torch.tensor([[0.0], [1.0], [10.0], [13.0]])
    assert diversity(x, ["a", "a", "b", "b"]) == pytest.approx(2)
    assert diversity(x, ["a", "b", "c", "d"]) == pytest.approx((1 + 10 + 13 + 9 + 12 + 3) / 6)
    assert nearest(x).tolist() == [1, 1, 3, 3]


def test_copies_are_duplicates_and_a_shift_is_distance():
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    prompts = ["a"] * 60
    reference = Reference.of(x)
    same = Change.of(x, prompts, reference)
    assert same.frechet == pytest.approx(0, abs=1e-8)
    assert same.duplicates < 0.1
    assert same.inception_score is None
    moved = Change.of(x + 3, prompts, reference)
    assert moved.frechet == pytest.approx(4 * 9)
    assert moved.diversity == pytest.approx(same.diversity)
    copied = torch.cat([x[:30], x[:30] + 1e-4])
    assert Change.of(copied, prompts, reference).duplicates == 1


def test_pixels_are_means_of_regions():
    image = torch.zeros(1, 3, 16, 24)
    image[:, 0, :2, :3] = 1
    found = pixels(image)
    assert found.shape == (1, 192)
    assert found.sum() == found[0, 0] == 1
