"""A replacement is proved before it is put in place: what the proof sees, and what it leaves."""

from __future__ import annotations

import functools
import itertools
import random

import numpy as np
import pytest
import restated
import torch
from combinations import values_first

import guard_ops as go
from guard_ops.integrations import (
    dance_grpo,
    flow_factory,
    flow_factory_unipc,
    flow_grpo,
    flow_grpo_bagel,
    flow_grpo_wan,
    unirl,
    verl_omni,
)
from guard_ops.integrations.cases import dance_grpo as dance_cases
from guard_ops.integrations.cases import flow_factory as factory_cases
from guard_ops.integrations.cases import flow_grpo as cases
from guard_ops.integrations.cases import unirl as unirl_cases
from guard_ops.integrations.cases import verl_omni as verl_cases
from guard_ops.integrations.proof import Cases, DisprovedError, covering, prove

pytest.importorskip("diffusers", reason="needs diffusers' schedulers")


def proved(original, replacement=flow_grpo.sde_step_with_logprob):
    return prove(original, replacement, lambda: cases.step(None))


def test_numbers_of_a_proof():
    proof = proved(restated.flow_grpo_step())
    assert proof.cases > 10
    assert 0 < proof.largest < 1e-5  # two float32 evaluations; measured 3e-7
    assert str(proof) == f"{proof.cases} cases, largest difference {proof.largest:.1e}"


@pytest.mark.parametrize(
    ("original", "replacement", "of"),
    [
        (restated.wan_step, flow_grpo_wan.sde_step_with_logprob, cases.wan_step),
        (
            lambda: restated.bagel()._sde_step_with_logprob,
            flow_grpo_bagel.sde_step_with_logprob,
            cases.bagel_step,
        ),
    ],
    ids=["wan", "bagel"],
)
def test_flow_grpos_other_models(original, replacement, of):
    assert prove(original(), replacement, lambda: of(None)).largest < 1e-5


def test_every_two_values_of_two_options_meet():
    options = {"a": (1, 2, 3), "b": (1, 2), "c": (1, 2, 3, 4), "d": (1, 2)}
    rows = covering(options)
    assert rows[0] == {"a": 1, "b": 1, "c": 1, "d": 1}
    for one in options:
        for other in options:
            met = {(row[one], row[other]) for row in rows}
            assert one == other or len(met) == len(options[one]) * len(options[other])
    assert len(rows) <= 16  # 48 combinations; 12 are the fewest
    assert [row["a"] for row in covering({"a": (1, 2)})] == [1, 2]


def changed(what):
    """The step with one fault in what it returns."""

    def step(self, model_output, timestep, sample, noise_level=0.7, prev_sample=None,
             generator=None, sde_type="sde", return_sqrt_dt=False):  # fmt: skip
        own = restated.flow_grpo_step()
        if what == "draws twice" and prev_sample is None:
            torch.randn(1, generator=generator if isinstance(generator, torch.Generator) else None)
        y, log_prob, mean, std, *root = own(
            self, model_output, timestep, sample, noise_level, prev_sample, generator, sde_type,
            return_sqrt_dt,
        )  # fmt: skip
        if what == "no gradient":
            log_prob = log_prob.detach()
        if what == "a gradient of half":
            log_prob = (log_prob + log_prob.detach()) / 2
        if what == "a sum":
            log_prob = log_prob * sample[0].numel()
        if what == "another shape":
            std = std.flatten()
        if what == "another dtype":
            mean = mean.double()
        if what == "one more":
            root = [*root, std]
        if what == "raises" and sde_type == "cps":
            raise NotImplementedError("no cps here")
        return y, log_prob, mean, std, *root

    return step


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("draws twice", r"sampling='its default'.*differs"),
        ("no gradient", r"ours has the gradient of its result\[1\] by `model_output`"),
        ("a gradient of half", r"gradient of its result\[1\] by `model_output` differs by 1 of"),
        ("a sum", r"its result\[1\] differs by .* of its magnitude: -.* but ours -"),
        ("another shape", r"its result\[3\] differs in shape: \(3,\) but ours \(3, 1, 1, 1\)"),
        ("another dtype", r"its result\[2\] differs in dtype: torch.float64 but ours torch.float"),
        ("one more", r"the type of its result is 'tuple of 5' but ours 'tuple of 4'"),
        ("raises", r"sde_type='cps'.*the original raises NotImplementedError\('no cps here'\)"),
    ],
)
def test_first_difference_is_said(what, message):
    with pytest.raises(DisprovedError, match=message):
        proved(changed(what))


def test_another_noise_level_is_seen():
    with pytest.raises(DisprovedError, match=r"its result\[1\] differs by"):
        proved(restated.flow_grpo_step(scale=1.01))


def test_an_original_that_answers_nothing_proves_nothing():
    def broken(self, model_output, timestep, sample):
        raise KeyError("config")

    def also(self, model_output, timestep, sample):
        raise ValueError

    with pytest.raises(DisprovedError, match=r"answers none of \d+ calls: KeyError\('config'\)"):
        proved(broken, also)


def test_generators_of_the_caller_go_on_as_if_nothing_had_been():
    torch.manual_seed(5)
    random.seed(5)
    numpys = np.random.get_state()[1].copy()  # noqa: NPY002
    states = torch.get_rng_state(), random.getstate()
    proved(restated.flow_grpo_step())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == numpys).all()  # noqa: NPY002


class DefaultDtype:
    def __enter__(self):
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *error):
        torch.set_default_dtype(torch.float32)


TARGETS = {
    "flow_grpo": (restated.flow_grpo_step, flow_grpo.sde_step_with_logprob, cases.step),
    "wan": (restated.wan_step, flow_grpo_wan.sde_step_with_logprob, cases.wan_step),
    "bagel": (restated.bagel, flow_grpo_bagel.sde_step_with_logprob, cases.bagel_step),
    "dance_grpo": (restated.flux_step, dance_grpo.flux_step, dance_cases.step),
    "verl_omni": (restated.verl_scheduler, verl_omni.sample_previous_step, verl_cases.step),
    "Euler": (
        lambda: restated.flow_factory_schedulers()[0],
        flow_factory.step,
        factory_cases.euler_step,
    ),
    "UniPC": (
        lambda: restated.flow_factory_schedulers()[1],
        flow_factory_unipc.step,
        factory_cases.unipc_step,
    ),
    "unirl": (
        lambda: restated.unirl_strategies()["FlowSDEStrategy"],
        unirl.denoise,
        unirl_cases.denoise,
    ),
    "flowdppo": (restated.flowdppo_loss, unirl.flowdppo_kl_adv_loss, unirl_cases.flowdppo),
}


def proof_of(target, monkeypatch):
    """The proof of a target's restated original."""
    make, replacement, of = TARGETS[target]
    _, _, output = restated.flow_factory_schedulers()
    monkeypatch.setattr(restated, output.__name__, output, raising=False)
    owner = original = make()
    if isinstance(owner, type):
        names = ("denoise", "sample_previous_step", "_sde_step_with_logprob", "step")
        original = next(getattr(owner, name) for name in names if name in dir(owner))
    return prove(original, replacement, lambda: of(owner))


@functools.cache
def in_no_mode(target):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return proof_of(target, monkeypatch)


MODES = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "device": lambda: torch.device("meta"),
    "dtype": DefaultDtype,
    "backend": lambda: go.use_backend("reference"),
}


@pytest.mark.parametrize("mode, target", values_first(itertools.product(MODES, TARGETS)))
def test_the_callers_mode_neither_matters_nor_changes(mode, target, monkeypatch):
    expected = in_no_mode(target)
    kept = (cases._euler, cases._unipc)
    for each in kept:
        each.cache_clear()
    with MODES[mode]():
        before = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        where = torch.empty(0)
        found = proof_of(target, monkeypatch)
        assert (torch.is_inference_mode_enabled(), torch.is_grad_enabled()) == before
        after = torch.empty(0)
        assert (after.dtype, after.device) == (where.dtype, where.device)
    assert (found.cases, found.largest) == (expected.cases, expected.largest)
    if any(each.cache_info().currsize for each in kept):  # schedulers that were made in the mode
        again = proof_of(target, monkeypatch)
        assert (again.cases, again.largest) == (expected.cases, expected.largest)


def test_nested_results_are_compared():
    result = {"a": [torch.zeros(2), 1.0]}

    def some():
        return Cases({"_one": (1,)}, lambda chosen: {"x": 1})

    assert prove(lambda x: result, lambda x: result, some).cases == 1
    other = {"a": [torch.zeros(2), 2.0]}
    with pytest.raises(DisprovedError, match=r"\['a'\]\[1\] is 1.0 but ours 2.0"):
        prove(lambda x: result, lambda x: other, some)


def test_a_rounding_of_16_bits_is_no_difference():
    """Of a value between two neighbours either may be right; two apart, neither is."""

    def build():
        one = torch.full((3,), 1.5, dtype=torch.bfloat16)
        return Cases({"_": (0,)}, lambda chosen: {"x": one})

    up = torch.finfo(torch.bfloat16).eps

    def moved(by):
        return lambda x: x + by * up

    assert prove(moved(0), moved(1), build).largest == 0.0
    with pytest.raises(DisprovedError, match="its result differs"):
        prove(moved(0), moved(2), build)
