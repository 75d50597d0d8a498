"""The same bits on every run, for any number of threads, and on AVX2 and AVX-512."""

import os
from pathlib import Path

import fresh
import pytest
import torch
from problems import FORMS, problem, relative, run

import guard_ops as go

CONFIGS = {
    "article": go.GuardConfig.article(),
    "flow_grpo": go.GuardConfig.flow_grpo(clip_low=0.2, clip_high=0.2),
}


def everything(form, dtype, config, numel=66001):
    """All numbers of one call over several chunks and an uneven tail, and of its backward."""
    given = problem(form, steps=2, batch=2, latent=(numel,), dtype=dtype, drift=0.2)
    out, grad = run(given, config)
    return [out.loss, out.log_ratio, out.excess, out.weights, *out.metrics, grad]


def same_bits(left, right):
    def bits(x):
        return x.contiguous().view(torch.uint8)

    return all(
        torch.equal(bits(a.reshape(-1)), bits(b.reshape(-1)))
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_the_number_of_threads_changes_no_bit(form, dtype, config, fused_backend):
    torch.set_num_threads(1)
    expected = everything(form, dtype, CONFIGS[config])
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        assert same_bits(everything(form, dtype, CONFIGS[config]), expected), threads


@pytest.mark.parametrize("threads", [2, 7])
def test_many_small_rows_change_no_bit_either(threads, fused_backend):
    """Work is shared by rows when they are small: the other way of splitting it."""
    given = problem("velocity", steps=5, batch=64, latent=(321,), dtype=torch.float32)
    torch.set_num_threads(1)
    expected, grad = run(given)
    torch.set_num_threads(threads)
    for _ in range(3):
        out, again = run(given)
        assert same_bits([*out[:5], *out.metrics, again], [*expected[:5], *expected.metrics, grad])


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_sde_step_is_the_same_for_any_number_of_threads(threads, fused_backend):
    x = torch.randn(3, 70001)
    v = torch.randn(3, 70001)
    coeffs = go.SdeSchedule([1.0, 0.6, 0.2, 0.0])[1]
    torch.set_num_threads(1)
    seeds = go.philox_seed(3, (3,))
    expected = go.sde_step(v, x, coeffs, seed=seeds)
    torch.set_num_threads(threads)
    got = go.sde_step(v, x, coeffs, seed=seeds)
    assert same_bits(got[:3], expected[:3])


def test_runs_repeat_bit_for_bit(backend):
    for form in FORMS:
        first = everything(form, torch.float32, CONFIGS["article"])
        assert same_bits(everything(form, torch.float32, CONFIGS["article"]), first)


def test_a_transition_does_not_depend_on_its_neighbours(fused_backend):
    """Cut out of its batch, a transition has the same sums, to the last bit."""
    given = problem("velocity", steps=4, batch=6, latent=(1500,), dtype=torch.float32)
    out, _ = run(given, CONFIGS["flow_grpo"])
    for k, i in ((0, 0), (3, 5), (2, 1)):
        one = {
            name: value[k : k + 1, i : i + 1]
            for name, value in given.items()
            if isinstance(value, torch.Tensor) and value.ndim > 1
        }
        one["advantages"] = given["advantages"][i : i + 1]
        one["coeffs"] = go.SdeSchedule((1.0, 0.9, 0.75, 0.55, 0.3, 0.1, 0.0))[1 + k : 2 + k]
        part, _ = run(one, CONFIGS["flow_grpo"])
        assert torch.equal(part.log_ratio[0, 0], out.log_ratio[k, i])


PROGRAM = """
import os
import sys
sys.path.insert(0, sys.argv[2])
import torch
import test_determinism
from guard_ops.backends import cpu
from problems import FORMS

isa = cpu.build_info()["cpu_isa"]
numbers = {} if isa != os.environ["GUARD_OPS_CPU_ISA"] else {
    f"{form} {dtype} {name} {numel}": test_determinism.everything(form, dtype, config, numel)
    for form in FORMS
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    for name, config in test_determinism.CONFIGS.items()
    for numel in (1, 37, 1061, *([66001] if (dtype, name) == (torch.float32, "article") else []))
}
torch.save({"isa": isa, "numbers": numbers}, sys.argv[1])
"""


@pytest.fixture(scope="module")
def by_isa(tmp_path_factory):
    """Instruction set -> what it computes, each in a process of its own."""
    folder = tmp_path_factory.mktemp("isa")
    env = os.environ | {"GUARD_OPS_BACKEND": "cpu"}
    out = {}
    for isa in go.backends.cpu.build_info()["cpu_isa_built"].split():
        environment = env | {"GUARD_OPS_CPU_ISA": isa}
        fresh.run(PROGRAM, str(folder / isa), str(Path(__file__).parent), environment=environment)
        result = torch.load(folder / isa)
        if result["isa"] == isa:
            out[isa] = result["numbers"]
    return out


@pytest.mark.skipif("cpu" not in go.available_backends(), reason="needs the compiled extension")
def test_avx2_and_avx512_give_the_same_bits(by_isa):
    if not {"avx2", "avx512"} <= by_isa.keys():
        pytest.skip(f"this processor has {', '.join(by_isa)} only")
    for key, expected in by_isa["avx512"].items():
        assert same_bits(by_isa["avx2"][key], expected), key


# The baseline emulates the fused multiply-add, which may round a tie the other way: one float32
# (float64) rounding of an element, of which a sum or a 16-bit gradient sees little.
@pytest.mark.skipif("cpu" not in go.available_backends(), reason="needs the compiled extension")
def test_the_baseline_is_close_to_the_fast_instruction_sets(by_isa):
    if "baseline" not in by_isa:
        pytest.skip("64-bit Arm has one instruction set")
    *_, fastest = by_isa.values()
    for key, expected in fastest.items():
        rounding = {"float64": 1e-11, "float32": 2e-6, "bfloat16": 1e-5, "float16": 1e-5}
        bound = rounding[key.split()[1].removeprefix("torch.")]
        for got, wanted in zip(by_isa["baseline"][key], expected, strict=True):
            assert torch.equal(wanted.isnan(), got.isnan()), key  # kl_old, in the log-prob form
            got, wanted = got.nan_to_num(), wanted.nan_to_num()
            assert relative(got, wanted) < bound, key
