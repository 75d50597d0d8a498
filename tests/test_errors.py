"""Bad operands of the ops: the argument is named, with what it got and what it needs."""

import re

import pytest
import torch
from problems import (
    FORMS,
    arguments,
    problem,
    schedule,
    without_advantages,
)

import guard_ops as go
from guard_ops.transitions import FORMS as OPERANDS

K, B, LATENT = 3, 4, (6, 5)
FULL = (K, B, *LATENT)
CALLS = {  # the same checks on the way into each
    "guard_loss": go.guard_loss,
    "guard_loss_and_grad": go.guard_loss_and_grad,
    "log_ratio": lambda **given: go.log_ratio(**without_advantages(given)),
}


def zeros(*shape, **options):
    return torch.zeros(*shape, **{"dtype": torch.float64, **options})


OPERAND_ERRORS = [
    # form, what to change, exception, message
    ("velocity", {"model_output": [1.0]}, TypeError, "`model_output` is a list; it needs a tensor"),
    (
        "velocity",
        {"model_output": zeros(*FULL, dtype=torch.int64)},
        TypeError,
        "`model_output` has dtype torch.int64; it needs float64, float32, bfloat16 or float16",
    ),
    (
        "velocity",
        {"model_output": zeros(*FULL, dtype=torch.complex64)},
        TypeError,
        "`model_output` has dtype torch.complex64",
    ),
    (
        "velocity",
        {"model_output": zeros(K, B)},
        ValueError,
        "`model_output` has shape (3, 4); with `coeffs` of shape (3,) it needs [K, B, *latent]",
    ),
    (
        "velocity",
        {"model_output": zeros(K, 0, *LATENT)},
        ValueError,
        "`model_output` has shape (3, 0, 6, 5), which is empty",
    ),
    (
        "velocity",
        {"model_output": zeros(2, B, *LATENT)},
        ValueError,
        "`coeffs` has shape (3,) but `model_output` (2, 4, 6, 5) needs (2,)",
    ),
    (
        "velocity",
        {"coeffs": schedule()},
        TypeError,
        "`coeffs` is a SdeSchedule; it needs StepCoefficients, as schedule[k] is",
    ),
    (
        "velocity",
        {"coeffs": schedule().to("meta")[1:4]},
        ValueError,
        "`coeffs` is on meta but `model_output` on cpu; use schedule.to(device) once",
    ),
    (
        "velocity",
        {"coeffs": schedule()[torch.ones(3, 5, dtype=torch.int64)]},
        ValueError,
        "`coeffs` has shape (3, 5) but `model_output` (3, 4, 6, 5) needs (3, 4)",
    ),
    (
        "velocity",
        {"coeffs": schedule("cps")[3:6]},
        ValueError,
        "`coeffs` has s == 0 at step 2 of this call: a deterministic step",
    ),
    (
        "noise",
        {"coeffs": go.SdeSchedule([0.9, 0.5, 0.2, 0.0], noise_level=0.0)[:]},
        ValueError,
        "`coeffs` has s == 0 at step 0, 1, 2 of this call",
    ),
    (
        "velocity",
        {"sample": zeros(K, B, 5, 6)},
        ValueError,
        "`sample` has shape (3, 4, 5, 6) but `model_output` (3, 4, 6, 5)",
    ),
    (
        "velocity",
        {"prev_sample": zeros(B, *LATENT)},
        ValueError,
        "`prev_sample` has shape (4, 6, 5) but `model_output` (3, 4, 6, 5)",
    ),
    (
        "velocity",
        {"old_model_output": zeros(1, B, *LATENT)},
        ValueError,
        "`old_model_output` has shape (1, 4, 6, 5) but `model_output` (3, 4, 6, 5)",
    ),
    ("noise", {"noise": zeros(*FULL, 1)}, ValueError, "`noise` has shape (3, 4, 6, 5, 1) but"),
    ("mean", {"old_mean": zeros(K, B, 30)}, ValueError, "`old_mean` has shape (3, 4, 30) but"),
    (
        "mean",
        {"old_mean": zeros(*FULL, device="meta")},
        ValueError,
        "`old_mean` is on meta but `model_output` on cpu",
    ),
    (
        "mean",
        {"old_mean": zeros(*FULL, dtype=torch.int32)},
        TypeError,
        "`old_mean` has dtype torch.int32",
    ),
    (
        "mean",
        {"old_mean": zeros(*FULL, requires_grad=True)},
        ValueError,
        "`old_mean` requires grad but is a constant of the loss; detach it",
    ),
    ("noise", {"noise": 0.5}, TypeError, "`noise` is a float; it needs a tensor"),
    (
        "log-prob",
        {"old_log_prob": zeros(B)},
        ValueError,
        "`old_log_prob` has shape (4,); with `model_output` of shape (3, 4, 6, 5) it needs (3, 4)",
    ),
    (
        "log-prob",
        {"old_log_prob": zeros(K, B, dtype=torch.int64)},
        TypeError,
        "`old_log_prob` has dtype torch.int64",
    ),
    (
        "log-prob",
        {"old_log_prob": zeros(K, B, requires_grad=True)},
        ValueError,
        "`old_log_prob` requires grad but is a constant",
    ),
    (
        "seeded",
        {"seed": 7},
        TypeError,
        "`seed` is 7 (int); it needs the rollout's seeds, philox_seed(seed, (K, B)), or its",
    ),
    (
        "seeded",
        {"seed": zeros(K, B, 2)},
        TypeError,
        "`seed` has dtype torch.float64; it needs torch.int64, as philox_seed's",
    ),
    (
        "seeded",
        {"seed": go.philox_seed(0, (K, B + 1))},
        ValueError,
        "`seed` has shape (3, 5, 2) but `model_output` (3, 4, 6, 5) needs (3, 4, 2)",
    ),
    (
        "seeded",
        {"seed": go.philox_seed(0, (K, B), device="meta")},
        ValueError,
        "`seed` is on meta but `model_output` on cpu",
    ),
    (
        "velocity",
        {"guidance_scale": 2.0},
        ValueError,
        "`model_output_uncond` is missing: classifier-free guidance needs both",
    ),
    (
        "velocity",
        {"model_output_uncond": zeros(*FULL)},
        ValueError,
        "`guidance_scale` is missing: classifier-free guidance needs both",
    ),
    (
        "velocity",
        {"model_output_uncond": zeros(*FULL), "guidance_scale": "2"},
        TypeError,
        "`guidance_scale` is '2' (str); it needs a number",
    ),
    (
        "velocity",
        {"model_output_uncond": zeros(K, B), "guidance_scale": 2.0},
        ValueError,
        "`model_output_uncond` has shape (3, 4) but `model_output` (3, 4, 6, 5)",
    ),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "form, changes, exception, message", OPERAND_ERRORS, ids=[e[3][:50] for e in OPERAND_ERRORS]
)
def test_bad_operands(form, changes, exception, message, call):
    given = arguments(problem(form, steps=K, batch=B, latent=LATENT), **changes)
    with pytest.raises(exception, match=re.escape(message)):
        CALLS[call](**given)


LOSS_ERRORS = [
    (
        {"advantages": zeros(B + 1)},
        ValueError,
        "`advantages` has shape (5,); with `model_output` of shape (3, 4, 6, 5) it needs "
        "(4,) or (3, 4)",
    ),
    (
        {"advantages": zeros(B, dtype=torch.int64)},
        TypeError,
        "`advantages` has dtype torch.int64; it needs float64, float32, bfloat16 or float16",
    ),
    ({"advantages": [1.0] * B}, TypeError, "`advantages` is a list; it needs a tensor"),
    (
        {"advantages": zeros(B, requires_grad=True)},
        ValueError,
        "`advantages` requires grad but is a constant of the loss; detach it",
    ),
    (
        {"advantages": zeros(B, device="meta")},
        ValueError,
        "`advantages` is on meta but `model_output` on cpu",
    ),
    (
        {"step_weights": zeros(B)},
        ValueError,
        "`step_weights` has shape (4,); with `model_output` of shape (3, 4, 6, 5) it needs (3, 4)",
    ),
    ({"step_weights": zeros(K, B, dtype=torch.int32)}, TypeError, "`step_weights` has dtype"),
    ({"config": {"clip_low": 0.2}}, TypeError, "`config` is a dict; it needs a GuardConfig"),
    (
        {"config": go.GuardConfig(kl_beta=0.1)},
        ValueError,
        "`ref_model_output` is missing; the KL term needs both",
    ),
    (
        {"ref_model_output": zeros(*FULL)},
        ValueError,
        "`ref_model_output` is given but `config.kl_beta` is 0; the KL term needs both",
    ),
    (
        {"ref_model_output": zeros(K, B), "config": go.GuardConfig(kl_beta=0.1)},
        ValueError,
        "`ref_model_output` has shape (3, 4) but `model_output` (3, 4, 6, 5)",
    ),
    (
        {"statistics": go.RatioStatistics(K), "config": go.GuardConfig.paper()},
        ValueError,
        "`statistics` is given but `config.ratio_norm` is 'closed_form', which has no use for it",
    ),
    (
        {"statistics": go.RatioStatistics(K + 1)},
        ValueError,
        "`statistics` covers steps of shape (4,) on cpu; this call needs (3,) on cpu",
    ),
    (
        {"statistics": go.RatioStatistics(K), "config": go.GuardConfig(detach_stats=False)},
        ValueError,
        "`config.detach_stats` is False, but statistics from other batches are constants",
    ),
    (
        {"statistics": go.RatioStatistics(K), "process_group": object()},
        ValueError,
        "`statistics` and `process_group` are both given; all-reduce the statistics",
    ),
    ({"statistics": {"mean": 0.0}}, TypeError, "`statistics` is a dict; it needs RatioStatistics"),
]


@pytest.mark.parametrize("call", ["guard_loss", "guard_loss_and_grad"])
@pytest.mark.parametrize(
    "changes, exception, message", LOSS_ERRORS, ids=[e[2][:50] for e in LOSS_ERRORS]
)
def test_bad_arguments_of_the_loss(changes, exception, message, call):
    given = arguments(problem("velocity", steps=K, batch=B, latent=LATENT), **changes)
    with pytest.raises(exception, match=re.escape(message)):
        CALLS[call](**given)


def all_operands():
    given = {}
    for form in FORMS:
        given |= problem(form, steps=K, batch=B, latent=LATENT)
    return given


@pytest.mark.parametrize("form", FORMS)
def test_half_of_a_form_is_refused(form):
    given = problem(form)
    for missing in OPERANDS[form]:
        left = sorted(set(OPERANDS[form]) - {missing})
        message = f"the behaviour policy is given by {' + '.join(left)}; it needs exactly one of"
        with pytest.raises(ValueError, match=re.escape(message)):
            go.guard_loss(**arguments(given, **{missing: None}))


@pytest.mark.parametrize("extra", ["old_mean", "noise", "seed", "old_log_prob"])
def test_two_forms_at_once_are_refused(extra):
    given = problem("velocity") | {extra: all_operands()[extra]}
    with pytest.raises(ValueError, match=re.escape(extra)) as error:
        go.guard_loss(**given)
    for name, parts in OPERANDS.items():  # and it lists what there is to choose from
        assert f"{name}: {' + '.join(parts)}" in str(error.value)


def test_no_form_at_all_is_refused():
    given = problem("velocity")
    nothing = dict.fromkeys(OPERANDS["velocity"])
    with pytest.raises(ValueError, match="the behaviour policy is given by nothing; it needs"):
        go.guard_loss(**arguments(given, **nothing))


def test_closed_form_is_refused_where_it_is_not_exact():
    given = problem("velocity", kind="cps")
    message = "`config.ratio_norm` is closed_form, which needs the Gaussian kappa 1 / (2 s^2)"
    with pytest.raises(ValueError, match=re.escape(message)):
        go.guard_loss(**given, config=go.GuardConfig.paper())
    message = "closed_form, which needs the behaviour policy's mean; the log-prob form does not"
    with pytest.raises(ValueError, match=re.escape(message)):
        go.guard_loss(**problem("log-prob"), config=go.GuardConfig.paper())


def test_log_prob_checks_like_log_ratio():
    x = zeros(*FULL)
    with pytest.raises(TypeError, match="`coeffs` is a SdeSchedule; it needs StepCoefficients"):
        go.log_prob(x, sample=x, prev_sample=x, coeffs=schedule())
    with pytest.raises(TypeError, match="`model_output` is a list; it needs a tensor"):
        go.log_prob([0.0], sample=x, prev_sample=x, coeffs=schedule()[1:4])
    with pytest.raises(ValueError, match=re.escape("`sample` has shape (4, 6, 5) but")):
        go.log_prob(x, sample=x[0], prev_sample=x, coeffs=schedule()[1:4])
    with pytest.raises(ValueError, match="`reduction` is 'none'; it needs one of mean, sum"):
        go.log_prob(x, sample=x, prev_sample=x, coeffs=schedule()[1:4], reduction="none")
    with pytest.raises(ValueError, match="`reduction` is 'none'; it needs one of mean, sum"):
        go.log_ratio(**without_advantages(problem("noise")), reduction="none")
