"""std_floor="auto": what rounding alone makes of a step is not blown up to unit variance."""

import itertools
import math

import pytest
import torch
from combinations import pairs_first
from problems import schedule

import guard_ops as go
from guard_ops import objective
from guard_ops.config import rounding_of

KINDS = ["flow_sde", "dance_sde", "wan_sde", "cps"]
HALVES = [torch.bfloat16, torch.float16]


def twice(shape, dtype, more=0.0):
    """Velocities of variance 2 that differ by their rounding, and by ``more`` times half of it."""
    v = torch.randn(shape) * math.sqrt(2)
    again = v * (1 + more * torch.finfo(dtype).eps / 2 * torch.randn(shape))
    return again.to(dtype), v.to(dtype)


def call(new, old, coeffs, **config):
    return go.guard_loss(
        new.requires_grad_(),
        advantages=torch.linspace(-1, 1, new.shape[-2 if new.ndim == 2 else 1]),
        coeffs=coeffs,
        config=go.GuardConfig.article(balance="none", **config),
        old_model_output=old,
        noise=torch.randn(old.shape),
    )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_formula_is_what_rounding_makes(kind, dtype):
    """Of every step: eps/4 rms(v) 2 kappa/D s |b| sqrt(D), times 0.6 to 2.8."""
    steps, batch, numel = 3 if kind == "cps" else 4, 64, 4096
    coeffs = schedule(kind)[:steps]
    config = go.GuardConfig()
    rounding = rounding_of(config, (dtype,), 1.0)
    assert rounding == pytest.approx(4 * torch.finfo(dtype).eps / 4 * math.sqrt(2))
    table = coeffs.table.unsqueeze(-1).expand(5, steps, batch)
    rows = go.StepCoefficients._of(table, coeffs.gaussian, ())
    square = objective.squared_gain(rows, numel, "mean").mean(-1)
    formula = objective.std_floor(square, config, rounding) / 4
    for more, low, high in ((0.1, 0.6, 1.2), (0.5, 1.1, 2.0), (1.0, 1.8, 2.9)):
        new, old = twice((steps, batch, numel), dtype, more)
        seen = go.log_ratio(
            new, coeffs=coeffs, old_model_output=old, noise=torch.randn(steps, batch, numel)
        ).log_ratio.std(1, correction=0)
        share = seen.double() / formula
        assert low < share.min(), (more, share)
        assert share.max() < high, (more, share)


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_is_neither_clipped_nor_blown_up(dtype, backend):
    new, old = twice((4, 8, 1024), dtype, 1.0)
    steps = schedule()[:4]
    auto = call(new, old, steps)
    auto.loss.backward()
    gradient = new.grad.double().norm()
    assert auto.metrics.degenerate.tolist() == [1.0] * 4
    assert auto.metrics.clip_fraction.tolist() == [0.0] * 4
    assert auto.excess.abs().max() < 1e-2
    new.grad = None
    number = call(new, old, steps, std_floor=1e-8)
    number.loss.backward()
    assert number.metrics.degenerate.tolist() == [0.0] * 4
    assert number.metrics.clip_fraction.max() > 0
    assert new.grad.double().norm() > 100 * gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_a_policy_that_has_moved_is_standardized(dtype, backend):
    old = torch.randn(4, 8, 1024, dtype=torch.float64)
    new = (old + 0.1 * torch.randn_like(old)).to(dtype)
    out = call(new, old.to(dtype), schedule()[:4])
    assert out.metrics.degenerate.tolist() == [0.0] * 4
    torch.testing.assert_close(out.metrics.ratio_hat_std, torch.ones(4).to(out.loss.dtype))


def test_wide_velocities_keep_the_floor_of_a_number():
    for dtypes in ((torch.float32,), (torch.float64, torch.float32)):
        assert rounding_of(go.GuardConfig(), dtypes, 1.0) == 0
    assert rounding_of(go.GuardConfig(std_floor=1e-8), (torch.bfloat16,), 1.0) == 0
    assert go.GuardConfig().least_std_floor == 1e-8
    assert go.GuardConfig(std_floor=0.5).least_std_floor == 0.5


def test_the_coarsest_velocity_counts(backend):
    """Beside a stored velocity of 16 bits, a float32 one differs by that rounding."""
    _, old = twice((4, 8, 1024), torch.bfloat16)
    out = call(old.float() * (1 + 1e-3 * torch.randn(4, 8, 1024)), old, schedule()[:4])
    assert out.metrics.degenerate.tolist() == [1.0] * 4


def floor_by_hand(coeffs, numel, dtype, reduction="mean", guidance=1.0):
    gain = 2 * coeffs.kappa * coeffs.s * coeffs.b.abs() / math.sqrt(numel)
    gain = gain * (numel if reduction == "sum" else 1)
    size = math.sqrt(2) * torch.finfo(dtype).eps * math.hypot(guidance, 1 - guidance)
    return size * gain.square().mean(-1).sqrt()


@pytest.mark.parametrize(
    "mixed, reduction, guidance",
    pairs_first(itertools.product([False, True], ["mean", "sum"], [None, 4.5])),
)
def test_where_the_floor_is(mixed, reduction, guidance, backend):
    """A step's spread just above and just below it, which target_std moves past."""
    numel, batch = 64, 6
    steps = torch.tensor([[0, 1, 2, 3, 0, 1], [1, 1, 1, 1, 1, 1]])
    coeffs = schedule()[steps if mixed else torch.tensor([2, 1])]
    rows = coeffs if mixed else schedule()[torch.tensor([[2] * batch, [1] * batch])]
    floor = floor_by_hand(rows, numel, torch.bfloat16, reduction, guidance or 1.0)
    old = torch.zeros(2, batch, numel, dtype=torch.bfloat16)
    unit = torch.tensor([1.0, -1, 1, -1, 1, -1]).reshape(1, batch, 1).expand(2, batch, numel)
    for share in (0.9, 1.1):
        # log r = 2 kappa/D (or kappa) b s d numel, with noise 1 and v - v_old = d, but for d^2
        scale = rows.kappa / numel if reduction == "mean" else rows.kappa
        wanted = share * floor.unsqueeze(-1) / (2 * scale * rows.b.abs() * rows.s * numel)
        new = (unit * wanted.unsqueeze(-1)).to(torch.bfloat16)
        more = {} if guidance is None else {"model_output_uncond": new, "guidance_scale": guidance}
        for target, expected in ((1.0, share < 1), (1e-6, False)):
            out = go.guard_loss(
                new,
                advantages=torch.ones(batch),
                coeffs=coeffs,
                config=go.GuardConfig(reduction=reduction, target_std=target),
                old_model_output=old,
                noise=torch.ones(2, batch, numel),
                **more,
            )
            assert out.metrics.degenerate.tolist() == [float(expected)] * 2, (share, target)


def test_given_statistics_are_judged_by_the_same_floor(backend):
    new, old = twice((4, 8, 1024), torch.bfloat16, 1.0)
    noise = torch.randn(4, 8, 1024)
    given = {"coeffs": schedule()[:4], "old_model_output": old, "noise": noise}
    statistics = go.RatioStatistics(4).update(go.log_ratio(new, **given).log_ratio)
    alone, with_statistics = (
        go.guard_loss(new, advantages=torch.randn(8).sign(), **given, **more)
        for more in ({}, {"statistics": statistics})
    )
    assert with_statistics.metrics.degenerate.tolist() == [1.0] * 4
    torch.testing.assert_close(alone.excess, with_statistics.excess)
    weights = {"step_weights": torch.full((4, 8), 0.25)}  # whose rows need no other row
    out = go.guard_loss_and_grad(
        new, advantages=torch.ones(8), **given, **weights, statistics=statistics
    )
    torch.testing.assert_close(alone.excess, out.excess)
    assert out.grad.double().norm() < 1


def test_a_gain_whose_square_overflows_leaves_a_floor_without_rounding_alone(backend):
    """0 times infinity is NaN, and a floor of NaN is one under which no step, or every step, is."""
    coeffs = go.SdeSchedule((1.0, 0.9, 0.5, 0.1), noise_level=1e-153)[1:3]
    rows = go.StepCoefficients._of(coeffs.table.unsqueeze(-1), True, ())
    assert objective.squared_gain(rows, 4096, "sum").isinf().all()
    config = {"config": go.GuardConfig.article(balance="none", reduction="sum")}
    more = {"advantages": torch.randn(4), "coeffs": coeffs} | config
    zero, noise = torch.zeros(2, 4, 4096, dtype=torch.float64), torch.randn(2, 4, 4096).double()
    on_policy = go.guard_loss_and_grad(zero, old_model_output=zero, noise=noise, **more)
    assert on_policy.metrics.degenerate.tolist() == [1.0, 1.0]
    assert on_policy.excess.abs().max() == 0
    drift = coeffs.s / coeffs.b.abs() * 5e-3  # |log r| up to about delta / s
    moved = (torch.randn(2, 4, 4096) * drift.reshape(2, 1, 1)).double()
    out = go.guard_loss_and_grad(moved, old_model_output=zero, noise=noise, **more)
    assert out.metrics.ratio_std.max() < 1
    assert out.metrics.degenerate.tolist() == [0.0, 0.0]
    torch.testing.assert_close(out.metrics.ratio_hat_std, torch.ones(2).double())


def test_norms_without_statistics_are_never_degenerate(backend):
    new, old = twice((4, 8, 64), torch.bfloat16)
    for norm in ("none", "closed_form"):
        out = call(new.detach(), old, schedule()[:4], ratio_norm=norm)
        assert out.metrics.degenerate.tolist() == [0.0] * 4
