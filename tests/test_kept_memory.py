"""Memory of freed results that the CPU backend keeps for the next ones (csrc/cpu/buffers.h)."""

import copy
import io
import os
import resource

import fresh
import pytest
import torch
from problems import problem
from problems import run as run_config

import guard_ops as go

if "cpu" not in go.available_backends():
    pytest.skip("the C++ kernels were not built", allow_module_level=True)

from guard_ops.backends import cpu

LATENT = (16, 128, 128)
GRADIENT = 4 * 4 * 16 * 128 * 128  # bytes, of 4 samples in float32


def run(given):
    return run_config(given, go.GuardConfig.flow_grpo(clip_low=0.9, clip_high=9.0))


@pytest.fixture(autouse=True)
def nothing_kept():
    with go.use_backend("cpu"):
        cpu.release_memory()
        yield
        cpu.release_memory()


@pytest.fixture
def given():
    made = problem("noise", steps=2, batch=2, latent=LATENT, dtype=torch.float32)
    cpu.release_memory()
    return made


def test_the_next_gradient_has_the_freed_one_s_memory(given):
    _, first = run(given)
    address, expected = first.data_ptr(), first.clone()
    _, second = run(given)
    assert second.data_ptr() != address  # the first is still held
    assert torch.equal(first, expected)
    assert expected.any()
    del first
    _, third = run(given)
    assert third.data_ptr() == address
    assert torch.equal(third, expected)


def test_a_training_step_meets_no_new_page(given):
    def faults(calls):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(calls):
            run(given)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults(3)
    pages = GRADIENT // resource.getpagesize()
    assert faults(20) < pages  # 20 times as many if each gradient were new


def test_release_memory_says_how_much_it_was(given):
    _, grad = run(given)
    assert cpu.release_memory() == 0
    del grad
    assert cpu.release_memory() == GRADIENT
    assert cpu.release_memory() == 0


def test_samples_of_a_rollout_are_kept_too(given):
    x = torch.randn(4, *LATENT)
    step = go.sde_step(x, x, go.SdeSchedule([1.0, 0.6, 0.3])[1], noise=torch.randn(4, *LATENT))
    del step
    assert cpu.release_memory() == 2 * GRADIENT  # the sample and its mean


def test_a_gradient_is_a_tensor_like_any_other(given):
    _, grad = run(given)
    expected = grad.clone()
    file = io.BytesIO()
    torch.save(grad, file)
    file.seek(0)
    for other in (copy.deepcopy(grad), torch.load(file), grad.detach().share_memory_()):
        assert torch.equal(other, expected)
    _, grad = run(given)
    larger = grad.flatten().resize_(2 * grad.numel())
    assert torch.equal(larger[: grad.numel()], expected.flatten())
    assert grad.untyped_storage().nbytes() == 2 * GRADIENT


def test_a_transposed_velocity_has_a_gradient_of_its_layout():
    given = problem("noise", steps=3, batch=4, latent=LATENT, dtype=torch.float32)
    v = given["model_output"].transpose(0, 1).contiguous().transpose(0, 1)
    _, grad = run(given | {"model_output": v})
    assert grad.stride() == v.stride()
    assert torch.equal(grad, run(given)[1])


PROGRAM = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    import guard_ops as go
    from guard_ops.backends import cpu
go.use_backend("cpu")
x = torch.randn(4, 2**18)
go.sde_step(x, x, go.SdeSchedule([1.0, 0.6, 0.3])[1])
print(cpu.release_memory(), [str(w.message) for w in caught if "guard_ops" in str(w.message)])
"""


@pytest.mark.parametrize(
    "limit, printed",
    [
        ("", f"{2 * 2**22} []"),
        ("4", f"{2**22} []"),
        ("0", "0 []"),
        ("many", "['guard_ops: GUARD_OPS_CPU_CACHE_MB is 'many'; it needs a whole number"),
        ("-1", "['guard_ops: GUARD_OPS_CPU_CACHE_MB is '-1'; it needs a whole number"),
    ],
)
def test_the_environment_sets_the_limit(limit, printed):
    output = fresh.run(PROGRAM, environment=os.environ | {"GUARD_OPS_CPU_CACHE_MB": limit})
    assert printed in output.replace('"', "'")
