"""Masked elements: they change nothing, to the bit, whatever they hold."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from problems import FORMS, problem, relative, run, truth, without_advantages

import guard_ops as go

LATENT = (3, 7, 101)  # more than a vector of any instruction set, and no multiple of it
CONFIGS = {
    "article": go.GuardConfig.article(),
    "paper": go.GuardConfig.paper(clip_low=0.05, clip_high=0.05),
    "plain": go.GuardConfig("none", balance="none", reduction="sum", clip_low=9, clip_high=9),
}
PER_ELEMENT = (
    "model_output",
    "model_output_uncond",
    "ref_model_output",
    "sample",
    "prev_sample",
    "old_mean",
    "old_model_output",
    "noise",
)


def draw(shape=LATENT, share=0.6):
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) < share


def wild(given, mask):
    """The same problem with NaN, infinities and huge numbers where the mask is 0."""
    mask = mask.expand(given["model_output"].shape)
    trash = torch.tensor([math.nan, math.inf, -math.inf, 1e4]).repeat(mask.numel() // 4 + 1)
    trash = trash[: mask.numel()].reshape(mask.shape)
    return {
        name: torch.where(mask, x, trash.to(x.dtype)) if name in PER_ELEMENT else x
        for name, x in given.items()
    }


def assert_same_bits(got, expected):
    (out, grad), (other, other_grad) = got, expected
    for name in ("loss", "log_ratio", "excess", "weights", "kl"):
        assert torch.equal(getattr(out, name), getattr(other, name)), name
    for name in out.metrics._fields:
        torch.testing.assert_close(
            getattr(out.metrics, name), getattr(other.metrics, name), rtol=0, atol=0, equal_nan=True
        )
    assert torch.equal(grad, other_grad)


@pytest.mark.parametrize(
    "latent, dtype", [(LATENT, torch.float32), (LATENT, torch.bfloat16), ((4, 256), torch.float32)]
)  # of the last all rows are aligned and all tiles whole, which fast paths ask for
@pytest.mark.parametrize("form", FORMS)
def test_what_a_masked_element_holds_changes_no_bit(backend, form, latent, dtype):
    if backend == "triton" and form == "seeded" and dtype == torch.bfloat16:
        pytest.skip("the interpreter takes seconds for noise")
    mask = draw(latent)
    given = problem(form, steps=2, batch=3, latent=latent, dtype=dtype) | {"mask": mask}
    config = CONFIGS["article"]
    got, expected = run(wild(given, mask), config), run(given, config)
    assert expected[0].metrics.nonfinite.eq(0).all()
    assert_same_bits(got, expected)
    masked, grad = ~mask.expand_as(got[1]), got[1]
    assert (grad[masked] == 0).all()
    assert not torch.signbit(grad[masked]).any()
    assert (grad[~masked] != 0).any()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("form", FORMS)
def test_a_masked_loss_is_that_of_the_counted_elements_alone(backend, form, name):
    """In float64, against plain indexing: of the mask's elements a latent of its own is made."""
    if form == "log-prob" and name == "paper":
        pytest.skip("the closed form needs the old mean")
    if form == "seeded":
        pytest.skip("its noise is numbered by the element's place in the whole latent")
    mask = draw()
    given = problem(form, latent=LATENT, dtype=torch.float32, reference=name != "plain")
    chosen = {n: x[..., mask] if n in PER_ELEMENT else x for n, x in given.items()}
    config = dataclasses.replace(CONFIGS[name], kl_beta=0.0 if name == "plain" else 0.1)
    out, grad = run(given | {"mask": mask}, config)
    expected, expected_grad = truth(chosen, config)
    assert relative(out.log_ratio, expected.log_ratio) < 2e-4  # float32 sums
    assert relative(out.kl, expected.kl) < 1e-5
    assert relative(grad[..., mask], expected_grad) < 2e-3
    assert relative(out.loss.detach(), expected.loss.detach()) < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_of_ones_gives_the_bits_of_no_mask(backend, form):
    given = problem(form, steps=2, batch=2, latent=LATENT, dtype=torch.float32)
    ones = torch.ones(LATENT, dtype=torch.bool)
    assert_same_bits(run(given | {"mask": ones}), run(given))


def test_masks_of_every_shape_and_dtype_are_the_same_mask(backend):
    given = problem("velocity", steps=2, batch=3, latent=LATENT, dtype=torch.float32)
    mask = draw()
    expected = run(given | {"mask": mask.expand(2, 3, *LATENT).contiguous()})
    for shape in (LATENT, (1, *LATENT), (3, *LATENT), (1, 3, *LATENT), (2, 1, *LATENT)):
        assert_same_bits(run(given | {"mask": mask.expand(shape).contiguous()}), expected)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert_same_bits(run(given | {"mask": mask.to(dtype)}), expected)


def test_every_transition_has_its_own_count(backend):
    """The ratio of one does not depend on how many elements another counts."""
    given = problem("mean", steps=2, batch=3, latent=LATENT, dtype=torch.float64 if
                    backend == "reference" else torch.float32)  # fmt: skip
    each = torch.stack([draw((3, *LATENT), 0.3), draw((3, *LATENT), 0.9)])
    out, grad = run(given | {"mask": each}, CONFIGS["plain"])
    for k in range(2):
        for i in range(3):
            alone, alone_grad = run(given | {"mask": each[k, i]}, CONFIGS["plain"])
            assert alone.log_ratio[k, i] == out.log_ratio[k, i]
            assert torch.equal(alone_grad[k, i], grad[k, i])


@pytest.mark.parametrize("nonfinite", ["propagate", "drop"])
def test_a_transition_without_counted_elements_has_ratio_one_and_no_gradient(backend, nonfinite):
    given = problem("velocity", steps=2, batch=3, latent=LATENT, dtype=torch.float32)
    mask = torch.ones((2, 3, *LATENT), dtype=torch.bool)
    mask[1, 2] = False
    config = go.GuardConfig.article(nonfinite=nonfinite)
    out, grad = run(wild(given, mask) | {"mask": mask}, config)
    assert out.log_ratio[1, 2] == 0
    assert (grad[1, 2] == 0).all()
    assert grad.isfinite().all()
    assert out.loss.isfinite()
    assert out.metrics.nonfinite.eq(0).all()


def test_nan_that_counts_is_propagated_and_masked_elements_stay_zero(backend):
    given = problem("velocity", steps=2, batch=3, latent=LATENT, dtype=torch.float32)
    mask = draw()
    given["model_output"][0, 1][mask] = math.nan
    config = go.GuardConfig.paper(clip_low=9, clip_high=9)
    _, grad = run(given | {"mask": mask}, config)
    assert grad[0, 1][mask].isnan().all()
    assert (grad[..., ~mask] == 0).all()


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("function", [go.guard_loss_and_grad, go.log_ratio])
def test_other_ways_in_take_the_mask(backend, function, guided):
    mask = draw()
    given = problem("noise", latent=LATENT, dtype=torch.float32, guided=guided) | {"mask": mask}
    trash = wild(given, mask)
    if function is go.log_ratio:
        got, expected = (function(**without_advantages(x)) for x in (trash, given))
        assert torch.equal(got.log_ratio, expected.log_ratio)
        assert torch.equal(got.kl_old, expected.kl_old)
        assert relative(got.log_ratio, run(given)[0].log_ratio) < 1e-6
        return
    got, expected = function(**trash), function(**given)
    grads = [x.grad if guided else (x.grad,) for x in (got, expected)]
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)
        assert (one[..., ~mask] == 0).all()


@pytest.mark.parametrize("source", ["noise", "seed"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sde_step_draws_as_without_mask_and_counts_what_it_says(backend, source, reduction):
    given = problem("velocity", steps=2, batch=2, latent=LATENT, dtype=torch.float32)
    v, x, coeffs, mask = given["model_output"], given["sample"], given["coeffs"], draw()
    noise = go.philox_seed(5, (2, 2)) if source == "seed" else torch.randn_like(v)
    step = go.sde_step(v, x, coeffs, mask=mask, reduction=reduction, **{source: noise})
    plain = go.sde_step(v, x, coeffs, **{source: noise})
    assert torch.equal(step.prev_sample, plain.prev_sample)
    assert torch.equal(step.mean, plain.mean)
    density = go.log_prob(
        v, sample=x, prev_sample=step.prev_sample, coeffs=coeffs, mask=mask, reduction=reduction
    )
    assert relative(step.log_prob, density) < 1e-5
    square = (step.prev_sample - step.mean).double()[..., mask] ** 2
    s, count = coeffs.s[:, None], mask.sum() if reduction == "sum" else 1
    over = square.sum(-1) if reduction == "sum" else square.mean(-1)
    expected = -over / (2 * s**2) - count * (s.log() + 0.5 * math.log(2 * math.pi))
    assert relative(step.log_prob, expected) < 1e-6
    v = torch.where(mask, v, math.nan)
    again = go.sde_step(v, x, coeffs, mask=mask, reduction=reduction, **{source: noise})
    assert torch.equal(again.log_prob, step.log_prob)


def test_the_log_prob_form_is_on_policy_after_a_masked_rollout(backend):
    mask = draw()
    given = problem("velocity", latent=LATENT, dtype=torch.float32)
    v, x, coeffs = given["old_model_output"], given["sample"], given["coeffs"]
    for reduction in ("mean", "sum"):
        step = go.sde_step(v, x, coeffs, mask=mask, reduction=reduction)
        ratio = go.log_ratio(
            v, coeffs=coeffs, sample=x, prev_sample=step.prev_sample, mask=mask,
            old_log_prob=step.log_prob, reduction=reduction,
        )  # fmt: skip
        size = 1 if reduction == "mean" else mask.sum().item()
        assert ratio.log_ratio.abs().max() < 1e-6 * size


def test_a_broadcast_mask_is_not_copied():
    from guard_ops import masks, transitions

    given = problem("velocity", steps=2, batch=3, latent=LATENT)
    shape = transitions.check_shape(given["model_output"], given["coeffs"])
    mask = draw((1, *LATENT))
    flat = masks.flat(mask, shape, mask.device)
    assert flat.shape == (2, 3, 3 * 7 * 101)
    assert flat.stride() == (0, 0, 1)
    assert flat.data_ptr() == mask.data_ptr()
    assert masks.counts(flat).stride() == (0, 0)


@pytest.mark.parametrize(
    "mask, error, message",
    [
        (torch.ones(5, 101), ValueError, r"`mask` has shape \(5, 101\); with `model_output` of "),
        (torch.ones(2, 3, 7, 101), ValueError, r"it needs \[\*latent\], \[B or 1, \*latent\] or"),
        (torch.ones(3, 7, 1), ValueError, "`mask` has shape"),
        (torch.ones(1, 1, 1, *LATENT), ValueError, "`mask` has shape"),
        (torch.ones(LATENT, dtype=torch.int64), TypeError, "`mask` has dtype torch.int64; it nee"),
        ([1], TypeError, "`mask` is a list; it needs a tensor"),
        (torch.ones(LATENT, requires_grad=True), ValueError, "`mask` requires grad"),
        (torch.ones(LATENT, device="meta"), ValueError, "`mask` is on meta but `model_output`"),
    ],
)
def test_what_is_no_mask_is_refused(mask, error, message):
    given = problem("velocity", latent=LATENT)
    with pytest.raises(error, match=message):
        go.guard_loss(**given, mask=mask)
    with pytest.raises(error, match=message):
        go.sde_step(given["model_output"], given["sample"], given["coeffs"], mask=mask)
