"""sde_step of every backend and instruction set against the truth."""

import strategies
import torch
import truth
from compare import agree, mismatch
from contenders import contenders
from hypothesis import given
from hypothesis import strategies as st
from operations import Call
from rounding import format_of
from tally import examples

import build
import guard_ops as go

STEPS = strategies.cases(poisoned=False, forms=("mean",))
OPERANDS = ("model_output", "model_output_uncond", "guidance_scale", "sample", "coeffs")


def step_arguments(case, source):
    built = build.arguments(case)
    arguments = {name: built[name] for name in OPERANDS if name in built}
    leading = (case.batch,) if case.one_step else (case.steps, case.batch)
    if source in strategies.DTYPES:
        draw = torch.Generator().manual_seed(case.seed + 3)
        noise = torch.randn(built["sample"].shape, generator=draw, dtype=torch.float64)
        arguments["noise"] = noise.to(source)
    else:
        arguments["seed"] = go.philox_seed(case.seed, leading)
    return arguments


@examples(share=0.08)
@given(
    case=STEPS,
    source=st.sampled_from((*strategies.DTYPES, "seed", "seed")),
    reduction=st.sampled_from(("mean", "sum")),
)
def test_sample_mean_and_log_prob_of_a_step_are_the_truth(case, source, reduction):
    arguments = step_arguments(case, source)
    sample_format = format_of(arguments["sample"].dtype)

    def expected():
        mean, y = truth.step(arguments)
        return {"mean": mean, "prev_sample": y.to(sample_format)}

    call = Call("sde_step", arguments | {"reduction": reduction})
    for contender, got in agree(call, expected):
        if not bool(got["prev_sample"].isfinite().all()):
            continue  # float16 cannot hold every sample
        density = truth.log_prob_of(arguments, got["prev_sample"], got["mean"], reduction)
        wrong = mismatch("log_prob", got["log_prob"], density)
        assert not wrong, f"{contender}: {wrong}"


@examples(share=0.01)
@given(case=STEPS, number=st.integers(0, 2**63 - 1))
def test_a_generators_noise_given_again_makes_the_same_step(case, number):
    arguments = step_arguments(case, torch.float32)
    del arguments["noise"]
    for contender in contenders()[:2]:  # the two of this process: a generator is not sent to others
        backend = contender.name.split("-")[0]
        with go.use_backend(backend):
            drawn = go.sde_step(**arguments, generator=torch.Generator().manual_seed(number))
            again = go.sde_step(**arguments, noise=drawn.noise)
        for name in ("prev_sample", "mean", "log_prob"):
            assert torch.equal(getattr(drawn, name), getattr(again, name)), (contender.name, name)
