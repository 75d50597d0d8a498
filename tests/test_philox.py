"""The seeded form's generator: Random123's known answers, and the normals made of them."""

import math
import re

import pytest
import torch
from problems import problem, run

import guard_ops as go
from guard_ops.backends.philox import normals, philox

ONE = go.StepCoefficients(  # y = 0 x + 1 v + 1 noise
    *(torch.tensor(x, dtype=torch.float64) for x in (0.0, 1.0, 1.0, 0.5, -1.0))
)


def word64(low, high):
    """Two 32-bit words as the int64 that holds them."""
    value = high << 32 | low
    return torch.tensor(value - (1 << 64) if value >> 63 else value)


def drawn(seeds, numel, dtype=torch.float32):
    """The noise that sde_step draws on the backend in use, [B, numel]."""
    zero = torch.zeros(*seeds.shape[:-1], numel, dtype=dtype)
    return go.sde_step(zero, zero, ONE, seed=seeds).prev_sample


# Random123's kat_vectors for philox4x32, 10 rounds: counter (4 words), key (2), result (4).
@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_known_answers(counter, key, expected):
    c, k, want = ([int(x, 16) for x in words.split()] for words in (counter, key, expected))
    got = philox(word64(*k), word64(*c[2:]), word64(*c[:2]))
    assert [int(word) for word in got] == want


def test_every_backend_regenerates_the_same_normals(fused_backend):
    """The integers, radii and angles are equal: what differs is log, sqrt, sin and cos."""
    seeds = torch.stack([go.philox_seed(seed, (3,)) for seed in (0, 12345, 2**63 - 1)])
    flat = seeds.reshape(-1, 2)
    for numel in (1, 2, 3, 5, 1023, 66001):
        expected = normals(seeds, numel, torch.float64).reshape(9, numel)
        assert (drawn(flat, numel).double() - expected).abs().max() < 1e-6
        assert (drawn(flat, numel, torch.float64) - expected).abs().max() < 1e-12
        single = normals(seeds, numel, torch.float32).reshape(9, numel)
        assert (single.double() - expected).abs().max() < 1e-6


def test_they_are_standard_normal(backend):
    """Within five standard errors of 1e6 draws: of moment p, sqrt((E z^2p - (E z^p)^2) / n)."""
    z = drawn(go.philox_seed(11, (4,)), 250_000).double()
    assert z.mean().abs() < 5 * 1e-3
    assert ((z**2).mean() - 1).abs() < 5 * math.sqrt(2) * 1e-3
    assert (z**3).mean().abs() < 5 * math.sqrt(15) * 1e-3
    assert ((z**4).mean() - 3).abs() < 5 * math.sqrt(105 - 9) * 1e-3
    inside = (z.abs() < 1.959964).double().mean()
    assert (inside - 0.95).abs() < 5 * math.sqrt(0.05 * 0.95) * 1e-3
    assert 4.3 < z.abs().max() < 6.8  # the largest radius of 32 bits is sqrt(-2 log 2^-33)


def test_they_are_uncorrelated(backend):
    """Between elements (also the four of one counter), transitions and seeds.

    Five standard errors: 2e-3 of the 250,000 pairs of two rows, 1e-3 or 1.2e-3 of all rows'.
    """
    seeds = torch.cat([go.philox_seed(1, (3,)), go.philox_seed(2, (1,))])
    z = drawn(seeds, 250_000).double()
    assert torch.corrcoef(z).fill_diagonal_(0).abs().max() < 1e-2
    for lag in (1, 2, 3, 4, 5, 8, 1024):
        assert (z[:, lag:] * z[:, :-lag]).mean().abs() < 5e-3
        assert ((z[:, lag:] ** 2 - 1) * (z[:, :-lag] ** 2 - 1)).mean().abs() < 2 * 5e-3
    quads = z.reshape(4, -1, 4)  # four times fewer pairs: twice the standard error
    for i in range(4):
        for j in range(i):
            assert (quads[..., i] * quads[..., j]).mean().abs() < 2 * 5e-3


def test_seeds_number_the_transitions():
    seeds = go.philox_seed(9, (2, 3))
    assert seeds.dtype == torch.int64
    assert seeds.tolist() == [[[9, 0], [9, 1], [9, 2]], [[9, 3], [9, 4], [9, 5]]]
    assert go.philox_seed(9, (3,)).tolist() == [[9, 0], [9, 1], [9, 2]]


def test_noise_follows_the_sample_through_slices_and_permutations(backend):
    """Any micro-batch, order or step of the seeds regenerates what the rollout drew."""
    seeds = go.philox_seed(5, (3, 6))
    whole = torch.stack([drawn(seeds[k], 77) for k in range(3)])
    order = torch.tensor([4, 0, 5, 2])
    assert torch.equal(drawn(seeds[1, order], 77), whole[1, order])
    assert torch.equal(drawn(seeds[2, 3:5], 77), whole[2, 3:5])
    # A shorter latent is the beginning of a longer one.
    assert torch.equal(drawn(seeds[0], 10), whole[0, :, :10])
    assert not torch.equal(drawn(go.philox_seed(6, (3, 6))[0], 77), whole[0])


def test_the_loss_regenerates_the_rollouts_noise(backend):
    """Micro-batches and permutations of a seeded trajectory have the whole's log-ratios."""
    given = problem("seeded", batch=6)
    out, _ = run(given, go.GuardConfig.flow_grpo())
    for part in ([4, 0, 5, 2], [1], [5, 4, 3, 2, 1, 0]):
        some = {
            n: x if n == "coeffs" else x[part] if n == "advantages" else x[:, part]
            for n, x in given.items()
        }
        got, _ = run(some, go.GuardConfig.flow_grpo())
        torch.testing.assert_close(got.log_ratio, out.log_ratio[:, part], rtol=1e-12, atol=1e-16)


def test_a_seed_is_the_noise_it_stands_for(backend):
    """The seeded form equals the noise form with the regenerated noise."""
    given = problem("seeded", latent=(9, 5))
    out, grad = run(given)
    seeds = given.pop("seed")
    noise = normals(seeds, 45, torch.float64).reshape(3, 4, 9, 5)
    expected, expected_grad = run(given | {"noise": noise})
    torch.testing.assert_close(out.excess, expected.excess, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-14)


def test_steps_of_a_rollout_draw_different_noise(backend):
    seeds, x = go.philox_seed(3, (2, 4)), torch.zeros(4, 1024)
    first, second = (go.sde_step(x, x, ONE, seed=seeds[k]).prev_sample for k in range(2))
    correlation = (first * second).mean() / (first.std() * second.std())
    assert abs(correlation.item()) < 4 / 64  # 4096 pairs, four standard deviations


def test_an_int_is_refused_as_it_would_draw_the_same_noise_at_every_step(backend):
    x = torch.zeros(4, 33)
    with pytest.raises(TypeError, match=r"`seed` is 3 \(int\); it needs the rollout's seeds, phil"):
        go.sde_step(x, x, ONE, seed=3)
    with pytest.raises(TypeError, match=r"an int would give every step the same noise"):
        go.guard_loss(x, advantages=x[:, 0], coeffs=ONE, old_model_output=x, seed=3)


@pytest.mark.parametrize(
    "seed, shape, exception, message",
    [
        (1.5, (2, 3), TypeError, "`seed` is 1.5 (float); it needs an int"),
        (True, (2, 3), TypeError, "`seed` is True (bool); it needs an int"),
        (-1, (2, 3), ValueError, "`seed` is -1; it needs 0 <= seed < 2**63"),
    ],
)
def test_bad_philox_seeds(seed, shape, exception, message):
    with pytest.raises(exception, match=re.escape(message)):
        go.philox_seed(seed, shape)
