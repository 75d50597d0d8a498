"""What is raced, on what, and the bytes it must move."""

import math

import pytest
import torch

from benchmarks import cases
from benchmarks.workloads import CI, WORKLOADS, named


def test_every_op_form_stage_mode_and_dtype_is_timed():
    found = {(c.op, c.stage, c.form, c.objective, c.dtype) for c in cases.op_cases(CI, CI.numel)}
    for dtype in (torch.float32, torch.bfloat16):
        for form in ("mean", "velocity", "noise", "seeded", "log-prob"):
            for stage in ("forward", "backward", "both"):
                assert ("log_ratio", stage, form, "-", dtype) in found
                assert ("guard_loss", stage, form, "article", dtype) in found
        for objective in ("paper", "flow_grpo"):
            assert ("guard_loss", "both", "mean", objective, dtype) in found
        assert ("sde_step", "forward", "seeded", "-", dtype) in found


def test_reference_is_timed_beside_every_op_once():
    plain = {(c.op, c.stage) for c in cases.op_cases(CI, CI.numel) if c.plain}
    stages = [("log_ratio", stage) for stage in cases.STAGES]
    stages += [("guard_loss", stage) for stage in cases.STAGES]
    assert plain == {("sde_step", "forward"), *stages}
    assert sum(c.plain for c in cases.op_cases(CI, CI.numel)) == len(plain)


def test_the_chain_of_a_workload_is_its_recipes():
    found = {c.workload.name: c for c in cases.workload_cases(named(None), 2**20)}
    assert set(found) == set(WORKLOADS)
    assert found["flux_512"].objective == "flow_grpo"
    assert found["qwen_image_1328"].objective == "paper"
    assert (found["hunyuan_720p"].objective, found["hunyuan_720p"].workload.kind) == (
        "dance_grpo",
        "dance_sde",
    )


def test_plain_pytorch_is_raced_eager_and_in_both_modes_of_compile():
    chains = {
        (c.workload.name, c.dtype): c.chains for c in cases.workload_cases(named(None), 2**20)
    }
    assert chains["ci", torch.float32] == (None, "default", "max-autotune")
    assert chains["wan21_720p", torch.float32] == (None, "default")
    assert chains["wan21_720p", torch.bfloat16] == (None,)
    everywhere = cases.workload_cases(named(None), 2**20, every_chain=True)
    assert {c.chains for c in everywhere} == {(None, "default", "max-autotune")}


# v, x, y and the mean read, the gradient written: counted by hand, and what
# log_ratio's second look at its operands adds to it.
@pytest.mark.parametrize(
    "op, stage, form, dtype, per_element",
    [
        ("guard_loss", "both", "mean", torch.float32, 20),
        ("guard_loss", "both", "mean", torch.bfloat16, 12),
        ("guard_loss", "both", "seeded", torch.bfloat16, 6),
        ("guard_loss", "forward", "noise", torch.float32, 12),
        ("guard_loss", "backward", "noise", torch.float32, 0),
        ("log_ratio", "forward", "mean", torch.float32, 16),
        ("log_ratio", "backward", "mean", torch.float32, 20),
        ("log_ratio", "both", "mean", torch.float32, 36),
        ("sde_step", "forward", "noise", torch.float32, 20),
        ("sde_step", "forward", "noise", torch.bfloat16, 12),
        ("sde_step", "forward", "seeded", torch.float32, 16),
    ],
)
def test_floor_of_an_op(op, stage, form, dtype, per_element):
    case = cases.Case(CI, CI, op, stage, form, "-", dtype)
    assert cases.floor_bytes(case) == per_element * CI.numel


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("elements", [1, 2**20, 2**22, 2**40])
def test_a_workload_is_shrunk_in_steps_then_batch_and_never_in_its_latents(name, elements):
    recipe = WORKLOADS[name]
    small = recipe.within(elements)
    assert small.latent == recipe.latent
    assert 1 <= small.steps <= recipe.steps
    assert 1 <= small.batch <= recipe.batch
    assert small.numel <= max(elements, math.prod(recipe.latent))
    if small.batch < recipe.batch:
        assert small.steps == 1
    if elements >= recipe.numel:
        assert small == recipe


def test_an_unknown_workload_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="no workload 'sd3'; there are ci, sd35_512, sd35_1024"):
        named(["ci", "sd3"])
