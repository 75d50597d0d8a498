"""What must hold bit for bit on every backend and instruction set, whatever the numbers are."""

import dataclasses

import pytest
import strategies
import torch
from contenders import contenders
from hypothesis import assume, given
from hypothesis import strategies as st
from operations import Call
from strategies import FORMS
from tally import examples, tally

import build
import guard_ops as go

pytestmark = pytest.mark.filterwarnings("ignore:guard_ops. standardize over a batch of one")

EXACT = ("velocity", "noise", "seeded")  # forms whose delta is b (v - v_old)
INDEPENDENT = go.GuardConfig("none", balance="none", clip_low=0.1, clip_high=0.1)
PER_ROW = ("log_ratio", "excess", "weights", "kl")


def same(x, y):
    """The same bits, NaN equal to NaN."""
    return torch.equal(x, y) or bool(((x == y) | (x.isnan() & y.isnan())).all())


def fused(arguments):
    """The contenders whose sums have a fixed order; torch's own depends on strides."""
    return [c for c in contenders() if c.name != "reference" and c.takes(arguments)]


def simple_loss(case, config=INDEPENDENT, advantages="transition"):
    options = {"advantages": advantages, "advantages_dtype": torch.float32, "factor": 1.0}
    options |= {"step_weights": False, "statistics": False}
    return build.loss_arguments(case, config, options)


@examples(share=0.03)
@given(
    case=strategies.cases(poisoned=False, forms=EXACT, guided=False),
    norm=st.sampled_from(("none", "standardize")),
)
def test_on_policy_is_exactly_on_policy(case, norm):
    dtypes = case.dtypes | {"model_output": case.dtypes["old_model_output"]}
    case = dataclasses.replace(case, dtypes=dtypes, drift=0.0, reach=0.0)
    arguments = simple_loss(case, dataclasses.replace(INDEPENDENT, ratio_norm=norm))
    assert torch.equal(arguments["model_output"], arguments["old_model_output"])
    ran = []
    for contender in contenders():
        if not contender.takes(arguments):
            continue
        got = contender.run(Call("guard_loss_and_grad", arguments))
        for name in ("log_ratio", "excess", "ratio_bias", "ratio_std", "clip_fraction", "kl_old"):
            assert bool((got[name] == 0).all()), (contender.name, name, got[name])
        ran.append(contender.name)
    tally("on policy", *ran)


@examples(share=0.02)
@given(case=strategies.cases(poisoned=False, forms=("mean",)))
def test_the_mean_of_sde_step_is_exactly_on_policy(case):
    case = dataclasses.replace(case, drift=0.0, reach=0.0)
    arguments = simple_loss(case)
    operands = ("model_output", "model_output_uncond", "guidance_scale", "sample", "coeffs")
    rollout = {name: arguments[name] for name in operands if name in arguments}
    rollout["noise"] = torch.ones_like(arguments["sample"])
    ran = []
    for contender in contenders():
        if not contender.takes(arguments):
            continue
        step = contender.run(Call("sde_step", rollout))
        mine = arguments | {"old_mean": step["mean"], "prev_sample": step["prev_sample"]}
        got = contender.run(Call("guard_loss_and_grad", mine))
        assert bool((got["log_ratio"] == 0).all()), (contender.name, got["log_ratio"])
        ran.append(contender.name)
    tally("on policy", *ran)


@examples(share=0.03)
@given(
    case=strategies.cases(poisoned=False),
    where=st.tuples(*[st.integers(0, 2**20)] * 3),
    bad=st.sampled_from(strategies.BAD),
    which=st.integers(0, 20),
    nonfinite=st.sampled_from(("propagate", "drop")),
    norm=st.sampled_from(("none", "standardize")),
)
def test_a_poison_leaves_other_samples_bits_alone(case, where, bad, which, nonfinite, norm):
    config = dataclasses.replace(INDEPENDENT, nonfinite=nonfinite, ratio_norm=norm)
    operands = [n for n in FORMS[case.form] if n != "seed"] + ["model_output", "advantages"]
    if case.guidance_scale is not None:
        operands.append("model_output_uncond")
    name = operands[which % len(operands)]
    case = dataclasses.replace(case, shared=None)
    clean = simple_loss(case, config)
    dirty = simple_loss(dataclasses.replace(case, poisons=((name, *where, bad),)), config)
    others = [i for i in range(case.batch) if i != where[1] % case.batch]
    assume(others)
    given_statistics = go.RatioStatistics(None if case.one_step else case.steps)
    shape = clean["advantages"].shape
    given_statistics.update(0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    if norm == "standardize":
        clean["statistics"] = dirty["statistics"] = given_statistics
    ran = []
    for contender in contenders():
        if not contender.takes(clean):
            continue
        before, after = (contender.run(Call("guard_loss_and_grad", x)) for x in (clean, dirty))
        if not bool((before["nonfinite"] == 0).all()):
            continue
        assert after["nonfinite"].sum() == 1, (contender.name, after["nonfinite"])
        names = [*PER_ROW, "grad"] if nonfinite == "propagate" else PER_ROW
        dim = 0 if case.one_step else 1
        index = torch.tensor(others)
        for each in names:
            x, y = (r[each].index_select(dim, index) for r in (before, after))
            assert same(x, y), (contender.name, each)
        ran.append(contender.name)
    tally("poison", *ran)


@examples(share=0.03)
@given(case=strategies.cases(poisoned=False), split=st.integers(1, 32))
def test_micro_batches_have_the_bits_of_the_whole(case, split):
    """Row by row, as the gradient is of a mean over the samples."""
    case = dataclasses.replace(case, shared=None)
    assume(case.batch > 1)
    arguments = simple_loss(case)
    split = 1 + split % (case.batch - 1)
    dim = 0 if case.one_step else 1
    ran = []
    for contender in fused(arguments):
        whole = contender.run(Call("guard_loss_and_grad", arguments))
        assert same(contender.run(Call("guard_loss_and_grad", arguments))["grad"], whole["grad"])
        parts = []
        for start, stop in ((0, split), (split, case.batch)):
            part = {
                name: x.narrow(dim, start, stop - start) if isinstance(x, torch.Tensor) else x
                for name, x in arguments.items()
            }
            if case.per_transition:
                table = arguments["coeffs"].table[:, :, start:stop]
                part["coeffs"] = go.StepCoefficients(*table, gaussian=arguments["coeffs"].gaussian)
            parts.append(contender.run(Call("guard_loss_and_grad", part)))
        for name in ("log_ratio", "excess", "weights"):
            joined = torch.cat([p[name] for p in parts], dim)
            assert same(joined, whole[name]), (contender.name, name)
        ran.append(contender.name)
    tally("micro-batches", *ran)


@examples(share=0.02)
@given(
    case=strategies.cases(poisoned=False),
    layouts=st.lists(st.sampled_from(strategies.LAYOUTS), min_size=8, max_size=8),
)
def test_strides_change_no_bit(case, layouts):
    plain = dataclasses.replace(case, layouts={}, shared=None)
    other = dataclasses.replace(plain, layouts=dict(zip(case.dtypes, layouts, strict=False)))
    plain_arguments, other_arguments = (simple_loss(x) for x in (plain, other))
    ran = []
    for contender in fused(plain_arguments):
        x, y = (
            contender.run(Call("guard_loss_and_grad", a))
            for a in (plain_arguments, other_arguments)
        )
        for name in x:
            assert same(x[name], y[name]), (contender.name, name)
        ran.append(contender.name)
    tally("strides", *ran)
