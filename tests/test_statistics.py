"""RatioStatistics: the whole batch's r_hat and gradient from parts of it."""

import math

import pytest
import torch
from problems import FORMS, problem, relative, run, without_advantages

import guard_ops as go
from guard_ops.statistics import merged

# Float64 sums in another order, divided by a spread of some 1e-2.
WIDE = 1e-10


def moments(log_ratio):
    u = torch.expm1(log_ratio)
    return u.mean(-1), u.std(-1, correction=0)


def samples(given, part):
    """The micro-batch of the samples ``part``."""
    shared = ("coeffs", "guidance_scale")
    return {
        n: x if n in shared else x[part] if n == "advantages" else x[:, part]
        for n, x in given.items()
    }


def collected(given, parts):
    statistics = go.RatioStatistics(given["model_output"].shape[0])
    for part in parts:
        with torch.no_grad():
            t = go.log_ratio(**without_advantages(samples(given, part)))
        statistics.update(t.log_ratio)
    return statistics


@pytest.mark.parametrize("parts", [[[0, 1, 2], [3, 4, 5]], [[5], [0, 3, 2, 1], [4]]], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_micro_batches_merged_are_the_large_batch(form, parts, backend):
    """Same r_hat, and the same gradient once each part is weighed by its share of the samples."""
    given = problem(form, batch=6, drift=0.4, guided=True)
    config = go.GuardConfig.article()
    whole, grad = run(given, config)
    statistics = collected(given, parts)
    total = 0.0
    for part in parts:
        out, part_grad = run(samples(given, part), config, statistics=statistics)
        share = len(part) / 6
        assert relative(out.excess, whole.excess[:, part]) < WIDE
        assert relative(out.weights, whole.weights[:, part]) < WIDE
        assert relative(share * part_grad, grad[:, part]) < WIDE
        total += share * out.loss.item()
    assert total == pytest.approx(whole.loss.item(), rel=1e-9)


def test_micro_batches_in_float32(backend):
    """log r is handed over in float32: r_hat moves by its rounding, 6e-8 of numbers up to 3."""
    given = problem("noise", batch=6, dtype=torch.float32, latent=(64, 8), drift=1e-2)
    config = go.GuardConfig.article()
    whole, grad = run(given, config)
    parts = [[0, 1, 2], [3, 4, 5]]
    statistics = collected(given, parts)
    for part in parts:
        out, part_grad = run(samples(given, part), config, statistics=statistics)
        assert (out.excess - whole.excess[:, part]).abs().max() < 1e-6
        assert relative(part_grad / 2, grad[:, part]) < 2e-6


def test_merging_parts_is_updating_with_the_whole():
    log_ratio = 1e-3 * torch.randn(3, 1000, dtype=torch.float64) + torch.tensor([[0.0], [1], [-2]])
    whole = go.RatioStatistics(3).update(log_ratio)
    parts = go.RatioStatistics(3)
    for part in log_ratio.split([1, 400, 599], dim=1):
        assert parts.merge(go.RatioStatistics(3).update(part)) is parts
    mean, std = moments(log_ratio)
    for statistics in (whole, parts):
        assert statistics.count.tolist() == [1000] * 3
        torch.testing.assert_close(statistics.mean, mean, rtol=1e-13, atol=1e-16)
        torch.testing.assert_close(statistics.std, std, rtol=1e-10, atol=0)


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_many_parts_at_once_are_merged_as_one_after_another(parts):
    """Also where some, or the first, are empty, and where squares overflow or underflow."""
    generator = torch.Generator().manual_seed(parts)
    count = torch.randint(0, 5, (parts, 6), generator=generator).double()
    count[0, 1], count[:, 2] = 0, 0
    mean = torch.randn(parts, 6, generator=generator, dtype=torch.float64) * (count > 0)
    root = torch.rand(parts, 6, generator=generator, dtype=torch.float64) * (count > 0)
    unit = torch.tensor([1.0, 1, 1, 1e300, 1e-300, 0.0], dtype=torch.float64)
    together = torch.stack([count, mean * unit, root * unit], 1)
    one = [[number.item() for number in step] for step in together[0].unbind(1)]
    for part in together[1:]:
        for step, (n, mu, rho) in enumerate(part.T.tolist()):
            n0, mu0, rho0 = one[step]
            total = n0 + n
            if total:
                between = (mu - mu0) * math.sqrt(n0 / total) * math.sqrt(n)
                one[step] = [total, mu0 + (mu - mu0) * (n / total), math.hypot(rho0, rho, between)]
    got = torch.stack(merged(together), 1)
    expected = torch.tensor(one, dtype=torch.float64)
    for step in range(6):  # whose units differ
        atol = 1e-15 * unit[step].item()
        torch.testing.assert_close(got[step], expected[step], rtol=1e-13, atol=atol)


def test_what_cannot_be_represented_stays_infinite_when_merged():
    parts = torch.tensor([[2.0, 0.5, math.inf], [1.0, 0.1, 0.2]], dtype=torch.float64)
    count, mean, root = merged(parts)
    assert (count, root) == (3.0, math.inf)
    assert mean.item() == pytest.approx(1.1 / 3)


def test_hand_computed_numbers():
    u = torch.tensor([[0.1, 0.3, -0.1, 0.5]], dtype=torch.float64)
    statistics = go.RatioStatistics(1).update(torch.log1p(u))
    assert statistics.mean.item() == pytest.approx(0.2)
    assert statistics.m2.item() == pytest.approx(0.01 + 0.01 + 0.09 + 0.09)
    assert statistics.std.item() == pytest.approx(math.sqrt(0.05))


def test_before_any_update_a_step_is_degenerate(backend):
    empty = go.RatioStatistics(3)
    assert empty.count.tolist() == empty.mean.tolist() == empty.std.tolist() == [0.0] * 3
    assert go.RatioStatistics(3).merge(empty).std.tolist() == [0.0] * 3
    given = problem("velocity")
    out, _ = run(given, go.GuardConfig(), statistics=empty)
    torch.testing.assert_close(out.excess, torch.expm1(out.log_ratio), rtol=1e-12, atol=1e-15)


def test_ratios_that_are_not_finite_are_left_out():
    log_ratio = torch.tensor([[0.1, math.nan, 0.2, math.inf], [800.0, 0.1, -math.inf, 0.3]])
    statistics = go.RatioStatistics(2).update(log_ratio)
    # log r = 800 has no ratio that a number can represent; -inf is left out by guard_loss too
    assert statistics.count.tolist() == [2, 2]
    first = torch.expm1(torch.tensor([0.1, 0.2]).double())
    second = torch.expm1(torch.tensor([0.1, 0.3]).double())
    expected = torch.stack([first.mean(), second.mean()])
    torch.testing.assert_close(statistics.mean, expected, rtol=1e-12, atol=0)


def test_decay_is_a_running_average():
    first, second = 0.1 * torch.randn(2, 50).double(), 0.1 * torch.randn(2, 50).double() + 0.3
    statistics = go.RatioStatistics(2).update(first)
    before = statistics.mean.clone(), statistics.std.clone()
    assert statistics.decay(0.25) is statistics
    assert statistics.count.tolist() == [12.5, 12.5]
    torch.testing.assert_close((statistics.mean, statistics.std), before)
    statistics.update(second)
    expected = (0.25 * torch.expm1(first).mean(-1) + torch.expm1(second).mean(-1)) / 1.25
    torch.testing.assert_close(statistics.mean, expected, rtol=1e-12, atol=1e-15)
    statistics.decay(0.0).update(first)
    torch.testing.assert_close((statistics.mean, statistics.std), moments(first))


def test_state_survives_a_round_trip(tmp_path):
    statistics = go.RatioStatistics(3).update(0.1 * torch.randn(3, 20))
    torch.save(statistics.state_dict(), tmp_path / "statistics.pt")
    other = go.RatioStatistics(3)
    other.load_state_dict(torch.load(tmp_path / "statistics.pt"))
    for name in ("count", "mean", "root_m2"):
        assert torch.equal(getattr(other, name), getattr(statistics, name))
    for value in (statistics.update(torch.randn(3, 2)), other):
        assert value.count.dtype == torch.float64
    assert other.count.tolist() == [20] * 3  # the loaded ones are their own


def test_some_of_the_steps(backend):
    given = problem("velocity")
    statistics = collected(given, [[0, 1, 2, 3]])
    whole, _ = run(given, go.GuardConfig(), statistics=statistics)
    part = statistics[1:]
    assert torch.equal(part.mean, statistics.mean[1:])
    part.update(torch.ones(2, 5))
    assert statistics.count.tolist() == [4] * 3  # a copy
    latents = {n: x[1] for n, x in given.items() if torch.is_tensor(x) and x.ndim > 2}
    coeffs = go.SdeSchedule((1.0, 0.9, 0.75, 0.55, 0.3, 0.1, 0.0))[2]
    one = latents | {"advantages": given["advantages"], "coeffs": coeffs}
    out, _ = run(one, go.GuardConfig(), statistics=statistics[1])
    assert torch.equal(out.excess, whole.excess[1])


@pytest.mark.parametrize(
    "call, exception, message",
    [
        (lambda: go.RatioStatistics(0), ValueError, "`steps` is 0; it needs a positive int"),
        (lambda: go.RatioStatistics(True), TypeError, r"`steps` is True \(bool\); it needs an int"),
        (lambda: go.RatioStatistics(2.5), TypeError, "`steps` is 2.5.*; it needs"),
        (
            lambda: go.RatioStatistics(2).update(torch.zeros(3, 4)),
            ValueError,
            r"`log_ratio` has shape \(3, 4\); it needs \(2,\) and the batch",
        ),
        (
            lambda: go.RatioStatistics().update(torch.zeros(3, 4)),
            ValueError,
            r"`log_ratio` has shape \(3, 4\); it needs \(\) and the batch",
        ),
        (lambda: go.RatioStatistics().update([0.0]), TypeError, "`log_ratio` is a list"),
        (
            lambda: go.RatioStatistics(2).merge(go.RatioStatistics(3)),
            ValueError,
            r"`other` covers steps of shape \(3,\) but this \(2,\)",
        ),
        (lambda: go.RatioStatistics(2).decay(1.5), ValueError, r"`factor` is 1.5; it needs \[0, 1"),
        (lambda: go.RatioStatistics(2).decay(-0.1), ValueError, r"`factor` is -0.1; it needs \[0"),
        (
            lambda: go.RatioStatistics(2).load_state_dict(go.RatioStatistics(3).state_dict()),
            ValueError,
            r"`state\['count'\]` has shape \(3,\); it needs \(2,\)",
        ),
    ],
)
def test_bad_arguments(call, exception, message):
    with pytest.raises(exception, match=message):
        call()


def test_a_ratio_whose_square_overflows_has_a_mean_and_a_std():
    log_ratio = torch.tensor([[0.1, 400.0], [0.1, 0.2]], dtype=torch.float64)
    statistics = go.RatioStatistics(2).update(log_ratio)
    half = math.exp(400) / 2
    assert statistics.mean[0].item() == pytest.approx(half, rel=1e-12)
    assert statistics.std[0].item() == pytest.approx(half, rel=1e-12)
    apart = go.RatioStatistics(2).update(log_ratio[:, :1])
    apart.merge(go.RatioStatistics(2).update(log_ratio[:, 1:]))
    torch.testing.assert_close(apart.std, statistics.std, rtol=1e-12, atol=0)
    torch.testing.assert_close(apart.mean, statistics.mean, rtol=1e-12, atol=0)


def test_a_ratio_is_judged_in_the_dtype_that_it_has():
    """A float32 result cannot represent exp(400), so a call leaves it out, and so does update."""
    statistics = go.RatioStatistics(1).update(torch.tensor([[0.1, 400.0]]))
    assert statistics.count.item() == 1
    assert statistics.std.item() == 0.0


def test_an_empty_batch_adds_nothing():
    statistics = go.RatioStatistics(2).update(torch.zeros(2, 0))
    assert statistics.count.tolist() == [0.0, 0.0]
    assert statistics.std.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "call, exception, message",
    [
        (lambda s: s.merge(3), TypeError, r"`other` is a int; it needs RatioStatistics"),
        (lambda s: s.decay("x"), TypeError, r"`factor` is 'x' \(str\); it needs a number"),
        (lambda s: s["a"], TypeError, r"`k` is 'a' \(str\); it needs an int or a slice"),
        (lambda s: s[::-1], ValueError, r"`k` is slice\(None, None, -1\); it needs a step of at"),
        (lambda s: s.load_state_dict(3), TypeError, r"`state` is 3 \(int\); it needs what state_d"),
        (lambda s: s.load_state_dict({"count": 1}), ValueError, r"`state` has no tensor 'count'"),
        (
            lambda s: s.update(torch.zeros(2, 3, device="meta")),
            ValueError,
            r"`log_ratio` is on meta",
        ),
        (
            lambda s: s.update(torch.zeros(2, 3).to_sparse()),
            TypeError,
            r"`log_ratio` is a sparse_coo",
        ),
    ],
)
def test_bad_arguments_are_named(call, exception, message):
    with pytest.raises(exception, match=message):
        call(go.RatioStatistics(2))


@pytest.mark.parametrize("factor", [0.9, 0.1, 1e-6])
def test_decay_changes_no_mean_and_no_std(factor):
    statistics = go.RatioStatistics(2).update(torch.randn(2, 4, dtype=torch.float64))
    mean, std = statistics.mean.clone(), statistics.std.clone()
    statistics.decay(factor)
    assert torch.equal(statistics.mean, mean)
    torch.testing.assert_close(statistics.std, std, rtol=1e-12, atol=0)
