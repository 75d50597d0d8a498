"""NaN and Inf stay in their transition, under "propagate" and under "drop"."""

import itertools
import math

import pytest
import torch
from problems import largest, problem, run, without_advantages

import guard_ops as go
from guard_ops.config import RATIO_NORMS

NORMS = tuple(RATIO_NORMS)
BALANCES = ("none", "inverse_ratio", "inverse_dt")
NAN, INF = math.nan, math.inf
MODES = list(itertools.product(NORMS, BALANCES))
HIT = (1, 2)  # the transition that is made not finite
WIDE = 1e-12  # float64 sums in another order


def configured(norm, balance, nonfinite, **more):
    return go.GuardConfig(
        norm, balance=balance, nonfinite=nonfinite, clip_low=0.05, clip_high=0.1, **more
    )


def poisoned(given, name, value, where=HIT, element=3):
    bad = given[name].clone()
    if name == "advantages":
        bad = bad.expand(given["model_output"].shape[:2]).clone()
        bad[where] = value
    elif name == "old_log_prob":
        bad[where] = value
    else:
        bad.flatten(2)[(*where, element)] = value
    return {**given, name: bad}


def frozen(given, config, finite):
    """What section 4 asks of the finite transitions: an ordinary call on the unpoisoned numbers
    whose statistics and weights, taken over the finite ones alone, are handed in as constants."""
    k, b = finite.shape
    log_ratio = go.log_ratio(**without_advantages(given)).log_ratio.double()
    more = {}
    if RATIO_NORMS[config.ratio_norm].statistics:
        seen = torch.where(finite, log_ratio, NAN)
        more["statistics"] = go.RatioStatistics(k).update(seen)
    excess = go.guard_loss(**given, config=config, **more).excess.double()
    weights = torch.zeros(k, b, dtype=torch.float64)
    for i in range(b):
        steps = [j for j in range(k) if finite[j, i]]
        if config.balance == "inverse_ratio":
            inverse = {j: 1 / max(1 + excess[j, i].item(), config.weight_floor) for j in steps}
        elif config.balance == "inverse_dt":
            inverse = {j: 1 / abs(given["coeffs"].dt[j].item()) for j in steps}
        else:
            inverse = dict.fromkeys(steps, 1.0)
        whole = sum(inverse.values()) if config.balance == "inverse_ratio" else len(steps)
        for j in steps:
            weights[j, i] = inverse[j] / whole
    return run(given, config, step_weights=weights, **more), weights


@pytest.mark.parametrize("nonfinite", ["propagate", "drop"])
@pytest.mark.parametrize("norm, balance", MODES)
@pytest.mark.parametrize(
    "form, name, value",
    [
        ("noise", "model_output", NAN),
        ("noise", "noise", INF),
        ("seeded", "old_model_output", NAN),
        ("velocity", "prev_sample", -INF),
        ("mean", "old_mean", NAN),
        ("mean", "sample", INF),
        ("velocity", "advantages", NAN),
        ("noise", "advantages", -INF),
    ],
)
def test_one_transition_reaches_no_other(form, name, value, norm, balance, nonfinite, backend):
    config = configured(norm, balance, nonfinite)
    clean = problem(form, steps=3, batch=4, latent=(37,), drift=0.4)
    bad = poisoned(clean, name, value)
    finite = torch.ones(3, 4, dtype=torch.bool)
    finite[HIT] = False
    (expected, expected_grad), weights = frozen(clean, config, finite)
    out, grad = run(bad, config)

    torch.testing.assert_close(out.weights, weights, rtol=WIDE, atol=0)
    assert out.excess[HIT].isnan()
    torch.testing.assert_close(out.excess[finite], expected.excess[finite], rtol=1e-9, atol=1e-13)
    assert torch.equal(out.metrics.nonfinite, torch.tensor([0.0, 1.0, 0.0]).to(grad.dtype))
    others = grad[finite]
    torch.testing.assert_close(others, expected_grad[finite], rtol=1e-9, atol=1e-13)
    for field in ("ratio_bias", "ratio_std", "ratio_hat_bias", "ratio_hat_std", "kl_old"):
        assert getattr(out.metrics, field).isfinite().all(), field
    if nonfinite == "propagate":
        assert out.loss.isnan()
        assert grad[HIT].isnan().all()
    else:
        assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12, abs=1e-14)
        assert torch.equal(grad[HIT], torch.zeros_like(grad[HIT]))


@pytest.mark.parametrize("nonfinite", ["propagate", "drop"])
@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("norm", ["none", "closed_form"])
def test_per_sample_modes_leave_other_samples_bitwise_alone(norm, balance, nonfinite, backend):
    """Nothing of another sample enters these modes, so nothing of it may change a bit."""
    config = configured(norm, balance, nonfinite)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        clean = problem("noise", steps=3, batch=4, latent=(37,), dtype=dtype, drift=0.4)
        _, expected = run(clean, config)
        _, grad = run(poisoned(clean, "model_output", NAN), config)
        others = [i for i in range(4) if i != HIT[1]]
        assert torch.equal(grad[:, others], expected[:, others])


@pytest.mark.parametrize("detach_stats", [True, False])
@pytest.mark.parametrize("norm, balance", MODES)
def test_a_sample_with_a_nan_advantage_is_as_if_it_were_not_there(
    norm, balance, detach_stats, backend
):
    """Under "drop": loss, gradient and metrics of the batch without it."""
    config = configured(norm, balance, "drop", detach_stats=detach_stats, kl_beta=0.2)
    given = problem("velocity", steps=3, batch=5, latent=(37,), drift=0.4, reference=True)
    keep = [0, 1, 3, 4]
    without = {
        name: value[keep] if value.ndim == 1 else value[:, keep]
        for name, value in given.items()
        if isinstance(value, torch.Tensor)
    } | {"coeffs": given["coeffs"]}
    expected, expected_grad = run(without, config)
    given["advantages"][2] = NAN
    out, grad = run(given, config)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    torch.testing.assert_close(grad[:, keep], expected_grad, rtol=1e-9, atol=1e-13)
    assert torch.equal(grad[:, 2], torch.zeros_like(grad[:, 2]))
    for name, value in expected.metrics._asdict().items():
        got = getattr(out.metrics, name)
        wanted = torch.ones_like(value) if name == "nonfinite" else value
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-14, msg=name)

    # "propagate" keeps the mean over all samples; the others' gradient is that share of it.
    config = configured(norm, balance, "propagate", detach_stats=detach_stats)
    del given["ref_model_output"], without["ref_model_output"]
    _, expected_grad = run(without, config)
    out, grad = run(given, config)
    assert out.loss.isnan()
    assert grad[:, 2].isnan().all()
    torch.testing.assert_close(grad[:, keep], 4 / 5 * expected_grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("nonfinite", ["propagate", "drop"])
def test_a_bad_reference_model_stays_in_its_transition(nonfinite, backend):
    config = configured("standardize", "none", nonfinite, kl_beta=0.3)
    clean = problem("velocity", steps=3, batch=4, latent=(37,), drift=0.4, reference=True)
    finite = torch.ones(3, 4, dtype=torch.bool)
    finite[HIT] = False
    share = 12 / 11 if nonfinite == "drop" else 1  # KL is a mean over the finite transitions
    frozen_config = configured("standardize", "none", nonfinite, kl_beta=0.3 * share)
    del (no_kl := dict(clean))["ref_model_output"]
    seen = torch.where(finite, go.log_ratio(**without_advantages(no_kl)).log_ratio, NAN)
    weights = finite.double() / 3
    weights[:, HIT[1]] *= 3 / 2
    _, expected = run(
        clean,
        frozen_config,
        statistics=go.RatioStatistics(3).update(seen),
        step_weights=weights,
    )
    out, grad = run(poisoned(clean, "ref_model_output", INF), config)
    torch.testing.assert_close(grad[finite], expected[finite], rtol=1e-9, atol=1e-13)
    assert out.loss.isnan() == (nonfinite == "propagate")
    if nonfinite == "drop":
        assert torch.equal(grad[HIT], torch.zeros_like(grad[HIT]))
    else:
        assert grad[HIT].isnan().all()


@pytest.mark.parametrize("nonfinite", ["propagate", "drop"])
@pytest.mark.parametrize("norm", NORMS)
def test_an_overflowing_ratio_is_not_finite(norm, nonfinite, backend):
    """exp(log r) past float64: as bad as a NaN, though log r itself is finite."""
    given = problem("noise", steps=2, batch=3, latent=(50,), drift=0.1)
    noise = given["noise"]
    b, s = (c[:, None, None] for c in (given["coeffs"].b, given["coeffs"].s))
    far = given["old_model_output"] + 30 * s * noise / b  # log r = 30 - 450 per element
    given["model_output"][1, 1] = far[1, 1]
    given["noise"] = noise.clone()
    given["noise"][1, 1] = 1e5 * noise[1, 1]
    config = go.GuardConfig(norm, nonfinite=nonfinite, reduction="sum")
    out, grad = run(given, config)
    assert out.log_ratio[1, 1] > 710
    assert out.metrics.nonfinite.tolist() == [0, 1]
    assert grad[0].isfinite().all()
    assert grad[1, [0, 2]].isfinite().all()
    assert out.loss.isnan() == (nonfinite == "propagate")


@pytest.mark.parametrize("norm, balance", MODES)
def test_nothing_finite_at_all(norm, balance, backend):
    given = problem("noise", steps=2, batch=3)
    given["advantages"] = torch.full((3,), NAN, dtype=torch.float64)
    out, grad = run(given, configured(norm, balance, "drop"))
    assert out.loss == 0
    assert torch.equal(grad, torch.zeros_like(grad))
    assert out.metrics.nonfinite.tolist() == [3, 3]
    out, grad = run(given, configured(norm, balance, "propagate"))
    assert out.loss.isnan()
    assert grad.isnan().all()


@pytest.mark.parametrize("guided", [True, False])
def test_log_ratio_gradient_stays_in_its_transition(guided, backend):
    """Other people's objectives mask with torch.where; the masked row's gradient is then 0."""
    given = without_advantages(problem("velocity", latent=(37,), guided=guided))
    v = poisoned(given, "model_output", NAN)["model_output"].requires_grad_()
    ratio = go.log_ratio(**{**given, "model_output": v}).log_ratio
    assert ratio[HIT].isnan()
    assert ratio.isnan().sum() == 1
    torch.where(ratio.isfinite(), ratio, 0.0).sum().backward()
    assert torch.equal(v.grad[HIT], torch.zeros_like(v.grad[HIT]))
    assert v.grad.isfinite().all()
    assert v.grad[0].abs().max() > 0


@pytest.mark.parametrize("numel", [70001, 10])
def test_many_bad_elements_and_chunks(numel, fused_backend):
    """A NaN in the last chunk of a row is the whole row's, in every 16-bit dtype too."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = problem("noise", steps=2, batch=3, latent=(numel,), dtype=dtype, drift=0.2)
        given["model_output"][1, 0, -1] = NAN
        config = configured("closed_form", "none", "drop")
        out, grad = run(given, config)
        assert out.metrics.nonfinite.tolist() == [0, 1]
        assert torch.equal(grad[1, 0], torch.zeros_like(grad[1, 0]))
        config = configured("closed_form", "none", "propagate")
        _, grad = run(given, config)
        assert grad[1, 0].isnan().all()
        assert grad.isnan().sum() == numel


# ---- what a result cannot represent -------------------------------------------------------------

LARGE = {torch.float32: 89.0, torch.float64: 710.0}  # log-ratios whose ratio has no such number
FITS = {torch.float32: 80.0, torch.float64: 700.0}  # and those of a ratio that has


def with_log_ratio(value, dtype, *, norm, balance="none", nonfinite="drop", **more):
    """A problem of [2, 4] one-element latents; transition (1, 2) has about that log-ratio."""
    given = problem("velocity", steps=2, latent=(1,), dtype=dtype, drift=0.01)
    coeffs = given["coeffs"]
    k, i = 1, 2
    # delta = b (v - v_old) along e: log r = kappa (2 delta e - delta^2), largest where delta = e
    size = math.sqrt(value / coeffs.kappa[k].item())
    x, old = given["sample"][k, i], given["old_model_output"][k, i]
    mean = coeffs.a[k] * x.double() + coeffs.b[k] * old.double()
    given["prev_sample"][k, i] = (mean + size).to(dtype)
    given["model_output"][k, i] = (old.double() + size / coeffs.b[k]).to(dtype)
    given["advantages"] = torch.tensor([1.0, 0.5, -1.0, -0.3], dtype=dtype)
    config = go.GuardConfig(norm, balance=balance, nonfinite=nonfinite, **more)
    return given, config


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_ratio_that_no_result_can_represent_is_dropped_and_counted(dtype, norm, balance, backend):
    given, config = with_log_ratio(LARGE[dtype], dtype, norm=norm, balance=balance)
    out, grad = run(given, config)
    assert out.log_ratio[HIT].item() == pytest.approx(LARGE[dtype], rel=1e-3)
    assert out.metrics.nonfinite.tolist() == [0, 1]
    assert out.loss.isfinite()
    assert torch.equal(grad[HIT], torch.zeros_like(grad[HIT]))
    assert grad.isfinite().all()
    assert out.excess.isnan().nonzero().tolist() == [list(HIT)]


@pytest.mark.parametrize("norm", ["none", "standardize"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_ratio_that_a_result_can_represent_takes_part(dtype, norm, backend):
    """Its square overflows, its statistics do not: u is about e^700, and the std 0.43 of it."""
    given, config = with_log_ratio(FITS[dtype], dtype, norm=norm)
    out, _ = run(given, config)
    assert out.metrics.nonfinite.tolist() == [0, 0]
    if norm == "standardize":  # one of four is far out: r_hat - 1 is sqrt(3), and -1 / sqrt(3)
        expected = torch.tensor([-1.0, -1.0, 3.0, -1.0], dtype=dtype) / math.sqrt(3)
        assert largest(out.excess[1], expected) < 1e-6
    else:
        assert out.excess[HIT].item() == pytest.approx(
            math.expm1(out.log_ratio[HIT].item()), rel=1e-4
        )
    assert out.metrics.ratio_std[1].item() == pytest.approx(
        math.expm1(out.log_ratio[HIT].item()) * math.sqrt(3) / 4, rel=1e-4
    )
    assert out.loss.isfinite()


@pytest.mark.parametrize("log_ratio", [89.0, 400.0])
def test_statistics_leave_out_what_the_call_leaves_out(log_ratio, backend):
    """Statistics of the call, and statistics from elsewhere, of the same float32 log-ratios."""
    given, config = with_log_ratio(log_ratio, torch.float32, norm="standardize")
    expected, grad = run(given, config)
    statistics = go.RatioStatistics(2).update(expected.log_ratio)
    out, got = run(given, config, statistics=statistics)
    assert statistics.count.tolist() == [4, 3]
    assert out.metrics.nonfinite.tolist() == expected.metrics.nonfinite.tolist() == [0, 1]
    assert largest(out.excess.nan_to_num(), expected.excess.nan_to_num()) < 1e-6
    assert largest(got, grad) <= 1e-6 * grad.abs().max()


def test_a_loss_that_no_result_can_represent_is_dropped_and_counted(backend):
    """Through the advantage, the step weight, and a statistic: the ratio itself is ordinary."""
    given = problem("velocity", steps=2, dtype=torch.float32)
    huge = {"advantages": torch.zeros(2, 4), "step_weights": torch.ones(2, 4)}
    for name, other in (("advantages", "step_weights"), ("step_weights", "advantages")):
        bad = {key: value.clone() for key, value in huge.items()}
        bad["advantages"] += 1
        bad[name][HIT], bad[other][HIT] = 3e38, 10.0
        config = go.GuardConfig("none", adv_clip=INF, nonfinite="drop")
        out, grad = run({**given, **bad}, config)
        assert out.metrics.nonfinite.tolist() == [0, 1], name
        assert out.loss.isfinite()
        assert torch.equal(grad[HIT], torch.zeros_like(grad[HIT]))
        assert grad.isfinite().all()


# ---- poison in what is no latent ----------------------------------------------------------------


@pytest.mark.parametrize("nonfinite", ["propagate", "drop"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("norm, balance", MODES)
def test_a_step_weight_that_is_not_finite_stays_in_its_transition(
    norm, balance, value, nonfinite, backend
):
    given = problem("velocity", dtype=torch.float32)
    config = configured(norm, balance, nonfinite)
    weights = torch.full((3, 4), 0.5)
    bad = weights.clone()
    bad[HIT] = value
    out, grad = run(given, config, step_weights=bad)
    nan_advantage = poisoned(given, "advantages", NAN)  # which takes the transition out in any case
    expected, expected_grad = run(nan_advantage, config, step_weights=weights)
    assert out.metrics.nonfinite.tolist() == [0, 1, 0]
    assert torch.equal(grad, expected_grad) or torch.equal(grad.isnan(), expected_grad.isnan())
    assert torch.equal(grad.nan_to_num(), expected_grad.nan_to_num())
    assert torch.equal(out.excess.nan_to_num(), expected.excess.nan_to_num())
    assert torch.equal(out.loss.nan_to_num(), expected.loss.nan_to_num())


@pytest.mark.parametrize("nonfinite", ["propagate", "drop"])
@pytest.mark.parametrize(
    "poison, value", [("mean", NAN), ("mean", INF), ("mean", -INF), ("std", NAN)]
)
def test_statistics_that_are_not_finite_stay_in_their_step(poison, value, nonfinite, backend):
    given = problem("velocity", dtype=torch.float32)
    config = configured("standardize", "inverse_ratio", nonfinite)
    good = go.RatioStatistics(3).update(go.log_ratio(**without_advantages(given)).log_ratio)
    bad = go.RatioStatistics(3)
    bad.load_state_dict({name: x.clone() for name, x in good.state_dict().items()})
    (bad.mean if poison == "mean" else bad.root_m2)[1] = value
    out, grad = run(given, config, statistics=bad)
    assert out.metrics.nonfinite.tolist() == [0, 4, 0]
    nothing = given["advantages"].expand(3, 4).clone()
    nothing[1] = NAN
    _, expected = run({**given, "advantages": nothing}, config, statistics=good)
    assert torch.equal(grad[[0, 2]], expected[[0, 2]])
    assert out.loss.isfinite() == (nonfinite == "drop")


def test_poison_in_any_number_of_a_call_reaches_no_other_transition(backend):
    """Every operand that is not a constant of the host, once, beside the latents' own tests."""
    given = problem("log-prob", reference=True, guided=True, dtype=torch.float32)
    config = go.GuardConfig("standardize", kl_beta=0.1, nonfinite="drop")
    given["step_weights"] = torch.full((3, 4), 0.3)
    given["advantages"] = given["advantages"].expand(3, 4).clone()
    tensors = [n for n, x in given.items() if isinstance(x, torch.Tensor)]
    assert len(tensors) == 8
    for name in tensors:
        out, grad = run({**given, name: poisoned_anywhere(given[name])}, config)
        assert out.metrics.nonfinite.tolist() == [0, 1, 0], name
        bad = out.excess.isnan()
        assert bad.nonzero().tolist() == [list(HIT)], name
        assert out.loss.isfinite(), name
        assert grad.isfinite().all(), name


def poisoned_anywhere(value):
    bad = value.clone()
    bad.reshape(3, 4, -1)[(*HIT, 0)] = NAN
    return bad


@pytest.mark.parametrize("detach_stats", [True, False])
def test_what_has_no_finite_loss_takes_no_part_in_statistics(detach_stats, backend):
    """Neither it, nor through the statistics its step's other samples: as if its ratio were NaN."""
    given = problem("velocity", dtype=torch.float32)
    config = go.GuardConfig("standardize", nonfinite="drop", detach_stats=detach_stats)
    weights = torch.full((3, 4), 0.5)
    huge = weights.clone()
    huge[HIT] = 3e38
    out, grad = run(given, config, step_weights=huge)
    nothing = poisoned(given, "advantages", NAN)
    expected, expected_grad = run(nothing, config, step_weights=weights)
    assert out.metrics.nonfinite.tolist() == [0, 1, 0]
    assert torch.equal(grad, expected_grad)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.metrics.ratio_std, expected.metrics.ratio_std)
