"""log_ratio and log_prob of every backend and instruction set against the truth."""

import strategies
import torch
import truth
from compare import agree
from hypothesis import given
from hypothesis import strategies as st
from operations import Call
from tally import examples

import build


def cotangents(case, dtype=torch.float32):
    draw = torch.Generator().manual_seed(case.seed + 2)
    leading = (case.batch,) if case.one_step else (case.steps, case.batch)
    return tuple(torch.randn(leading, generator=draw).to(dtype) for _ in range(2))


@examples(share=0.09)
@given(case=strategies.cases(), reduction=st.sampled_from(("mean", "sum")))
def test_log_ratio_and_its_gradient_are_the_truth(case, reduction):
    arguments = build.arguments(case, reduction)
    del arguments["ref_model_output"]
    pulled = cotangents(case)
    agree(
        Call("log_ratio", arguments | {"reduction": reduction}, pulled),
        lambda: truth.log_ratio(arguments, reduction, pulled),
    )


@examples(share=0.04)
@given(
    case=strategies.cases(forms=("log-prob",), guided=False),
    reduction=st.sampled_from(("mean", "sum")),
)
def test_log_prob_and_its_gradient_are_the_truth(case, reduction):
    arguments = build.arguments(case, reduction)
    for name in ("ref_model_output", "old_log_prob"):
        del arguments[name]
    pulled, nothing = cotangents(case)

    def expected():
        out = truth.log_ratio(
            arguments | {"old_log_prob": torch.zeros_like(nothing)}, reduction, (pulled, nothing)
        )
        return {"log_prob": out["log_ratio"], "grad": out["grad"]}

    agree(Call("log_prob", arguments | {"reduction": reduction}, pulled), expected)
