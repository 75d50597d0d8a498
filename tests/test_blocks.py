"""The building blocks make guard_loss, and refuse what it refuses."""

import re

import pytest
import torch
from problems import FORMS, problem, relative, run, schedule, without_advantages

import guard_ops as go


@pytest.mark.parametrize("steps", [3, None])
@pytest.mark.parametrize("recipe", ["article", "paper", "flow_grpo"])
@pytest.mark.parametrize("form", FORMS)
def test_the_blocks_compose_to_guard_loss(form, recipe, steps, backend):
    """Loss, excess, weights and gradient; what someone with an objective of their own relies on."""
    if form == "log-prob" and recipe == "paper":
        recipe = "flow_grpo"
    more = {"balance": "none"} if steps is None and recipe == "article" else {}
    config = getattr(go.GuardConfig, recipe)(clip_low=0.02, clip_high=0.03, **more)
    given = problem(form, steps=steps, drift=0.4)
    out, grad = run(given, config)
    v = given["model_output"].clone().requires_grad_()
    t = go.log_ratio(**without_advantages({**given, "model_output": v}))
    coeffs = given["coeffs"]
    excess = go.ratio_norm(t.log_ratio, config=config, coeffs=coeffs, kl_old=t.kl_old)
    weights = go.balance_weights(excess, config=config, coeffs=coeffs)
    losses = go.clipped_surrogate(excess, given["advantages"], config=config)
    loss = (weights * losses).reshape(-1, 4).sum(0).mean()
    loss.backward()
    torch.testing.assert_close(t.log_ratio, out.log_ratio, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(excess, out.excess, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(weights, out.weights, rtol=1e-11, atol=1e-14)
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-12)
    assert relative(v.grad, grad) < 1e-11


def test_metrics_by_hand(backend):
    """Eight samples whose excesses are known: shares, means, spreads, and the KL."""
    given = problem("noise", steps=None, batch=8, drift=0.5)
    given["advantages"] = torch.tensor([1.0, -1.0, -1.0, 1.0] * 2, dtype=torch.float64)
    config = go.GuardConfig("none", clip_low=0.005, clip_high=0.01)
    out, _ = run(given, config)
    u, a, metrics = out.excess, given["advantages"], out.metrics
    high, low = u > 0.01, u < -0.005
    clipped = (high & (a > 0)) | (low & (a < 0))
    assert 0 < clipped.sum() < high.sum() + low.sum() < 8
    assert high.any()
    expected = {
        "ratio_bias": u.mean(),
        "ratio_std": u.std(correction=0),
        "ratio_hat_bias": u.mean(),
        "ratio_hat_std": u.std(correction=0),
        "clip_fraction": clipped.double().mean(),
        "clip_fraction_high": high.double().mean(),
        "clip_fraction_low": low.double().mean(),
        "kl_old": go.log_ratio(**without_advantages(given)).kl_old.mean(),
        "grad_weight": torch.ones(()).double(),
        "nonfinite": torch.zeros(()).double(),
        "degenerate": torch.zeros(()).double(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(metrics, name), value, rtol=1e-12, atol=1e-15, msg=name)


def test_given_step_weights_replace_the_balance(backend):
    given = problem("velocity")
    weights = torch.rand(3, 4, dtype=torch.float64)
    config = go.GuardConfig.article()
    out, grad = run(given, config, step_weights=weights)
    assert torch.equal(out.weights, weights)
    expected, expected_grad = run(given, go.GuardConfig(), step_weights=torch.ones(3, 4))
    scale = weights[..., None, None].expand_as(grad)
    assert relative(grad, scale * expected_grad) < 1e-12
    assert relative(out.excess, expected.excess) < 1e-12


@pytest.mark.parametrize(
    "call, exception, message",
    [
        (
            lambda x: go.ratio_norm(x, config=go.GuardConfig.paper(), kl_old=x),
            ValueError,
            "`coeffs` is missing: closed_form needs both",
        ),
        (
            lambda x: go.ratio_norm(x, config=go.GuardConfig.paper(), coeffs=schedule()[:2]),
            ValueError,
            "`kl_old` is missing: closed_form needs both",
        ),
        (
            lambda x: go.ratio_norm(
                x, config=go.GuardConfig.paper(), coeffs=schedule("cps")[:2], kl_old=x
            ),
            ValueError,
            "`config.ratio_norm` is closed_form, which needs the Gaussian kappa",
        ),
        (
            lambda x: go.ratio_norm(
                x, config=go.GuardConfig.paper(), coeffs=schedule()[:2], kl_old=x[0]
            ),
            ValueError,
            "`kl_old` has shape (3,) but `log_ratio` (2, 3)",
        ),
        (
            lambda x: go.ratio_norm(
                x, config=go.GuardConfig.paper(), coeffs=schedule()[:3], kl_old=x
            ),
            ValueError,
            "`coeffs` has shape (3,)",
        ),
        (
            lambda x: go.ratio_norm(
                x, config=go.GuardConfig.paper(), coeffs=schedule()[:1], kl_old=x
            ),
            ValueError,
            "`coeffs` has shape (1,)",
        ),
        (
            lambda x: go.ratio_norm(
                x[0], config=go.GuardConfig.paper(), coeffs=schedule()[:3], kl_old=x[0]
            ),
            ValueError,
            "`coeffs` has shape (3,)",
        ),
        (
            lambda x: go.ratio_norm(x, config=go.GuardConfig(), statistics=go.RatioStatistics()),
            ValueError,
            "`statistics` covers steps of shape () on cpu; this call needs (2,) on cpu",
        ),
        (
            lambda x: go.ratio_norm(
                x, config=go.GuardConfig("none"), statistics=go.RatioStatistics(2)
            ),
            ValueError,
            "`statistics` is given but `config.ratio_norm` is 'none'",
        ),
        (
            lambda x: go.ratio_norm(x.long(), config=go.GuardConfig()),
            TypeError,
            "`log_ratio` has dtype torch.int64; it needs float64, float32",
        ),
        (
            lambda x: go.ratio_norm([0.0], config=go.GuardConfig()),
            TypeError,
            "`log_ratio` is a list; it needs a tensor",
        ),
        (
            lambda x: go.ratio_norm(x, config={"ratio_norm": "none"}),
            TypeError,
            "`config` is a dict; it needs a GuardConfig",
        ),
        (
            lambda x: go.ratio_norm(x[None], config=go.GuardConfig()),
            ValueError,
            "`log_ratio` has shape (1, 2, 3); it needs [K, B] or [B]",
        ),
        (
            lambda x: go.balance_weights(x, config=go.GuardConfig(balance="inverse_dt")),
            ValueError,
            "`coeffs` is missing: inverse_dt needs it",
        ),
        (
            lambda x: go.balance_weights(
                x, config=go.GuardConfig(balance="inverse_dt"), coeffs=schedule()[:3]
            ),
            ValueError,
            "`coeffs` has shape (3,)",
        ),
        (
            lambda x: go.balance_weights(x[:, :0], config=go.GuardConfig()),
            ValueError,
            "`excess` has shape (2, 0); it needs [K, B] or [B]",
        ),
        (
            lambda x: go.clipped_surrogate(x, x[:, 0], config=go.GuardConfig()),
            ValueError,
            "`advantages` has shape (2,) but `excess` (2, 3)",
        ),
        (
            lambda x: go.clipped_surrogate(x, x[0].long(), config=go.GuardConfig()),
            TypeError,
            "`advantages` has dtype torch.int64",
        ),
        (
            lambda x: go.clipped_surrogate(x, [1.0, 2.0, 3.0], config=go.GuardConfig()),
            TypeError,
            "`advantages` is a list; it needs a tensor",
        ),
    ],
)
def test_blocks_refuse_what_guard_loss_refuses(call, exception, message):
    with pytest.raises(exception, match=re.escape(message)):
        call(torch.zeros(2, 3, dtype=torch.float64))


def test_a_ratio_whose_square_overflows_is_standardized():
    """One of four far out: sqrt(3) and -1 / sqrt(3), whatever its size."""
    log_ratio = torch.tensor([[0.01, -0.02, 0.03, 400.0]], dtype=torch.float64)
    got = go.ratio_norm(log_ratio, config=go.GuardConfig.article())
    expected = torch.tensor([[-1.0, -1.0, -1.0, 3.0]], dtype=torch.float64) / 3**0.5
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_a_float32_ratio_that_float32_cannot_represent_takes_no_part():
    log_ratio = torch.tensor([[0.01, -0.02, 0.03, 400.0]])
    for norm in ("none", "standardize"):
        got = go.ratio_norm(log_ratio, config=go.GuardConfig(norm))
        assert got.isnan().tolist() == [[False, False, False, True]]
        rest = go.ratio_norm(log_ratio[:, :3], config=go.GuardConfig(norm))
        assert torch.equal(got[:, :3], rest)


@pytest.mark.parametrize("block", ["ratio_norm", "balance_weights"])
def test_tensors_of_other_kinds_are_refused_by_name(block):
    call = getattr(go, block)
    name = "log_ratio" if block == "ratio_norm" else "excess"
    with pytest.raises(TypeError, match=f"`{name}` is a sparse_coo tensor; it needs a dense one"):
        call(torch.zeros(2, 3).to_sparse(), config=go.GuardConfig("none"))
    with pytest.raises(
        TypeError, match=f"`{name}` has dtype torch.float8_e4m3fn; it needs float64"
    ):
        call(torch.zeros(2, 3).to(torch.float8_e4m3fn), config=go.GuardConfig("none"))
    freed = torch.zeros(2, 3)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"`{name}` has shape .* but its memory was freed"):
        call(freed, config=go.GuardConfig("none"))


def test_tensors_on_other_devices_are_refused_by_name():
    excess, config = torch.zeros(2, 3), go.GuardConfig("closed_form", balance="inverse_dt")
    elsewhere = torch.zeros(2, 3, device="meta")
    coeffs = go.SdeSchedule([0.9, 0.5, 0.1])[:]
    with pytest.raises(ValueError, match="`advantages` is on meta but `excess` on cpu"):
        go.clipped_surrogate(excess, elsewhere, config=config)
    with pytest.raises(ValueError, match="`kl_old` is on meta but `log_ratio` on cpu"):
        go.ratio_norm(excess, config=config, coeffs=coeffs, kl_old=elsewhere)
    with pytest.raises(ValueError, match=r"`coeffs` is on meta but the .* numbers on cpu"):
        go.balance_weights(excess, config=config, coeffs=coeffs.to("meta"))


def test_blocks_compile_and_transform():
    """They are plain PyTorch: torch.compile traces them, torch.func differentiates them."""
    config = go.GuardConfig.article(balance="none", detach_stats=False)
    x = torch.randn(3, 8, dtype=torch.float64) * 0.1

    def loss(x):
        excess = go.ratio_norm(x, config=config)
        weights = go.balance_weights(excess.detach(), config=config)
        return (weights * go.clipped_surrogate(excess, x[0].detach(), config=config)).sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected, rtol=1e-12, atol=0)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), loss(x), rtol=1e-12, atol=0)
