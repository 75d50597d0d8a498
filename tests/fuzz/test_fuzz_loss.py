"""guard_loss and guard_loss_and_grad of every backend and instruction set against the truth."""

import math

import build
import pytest
import strategies
import truth
import truth_loss
from compare import differences
from contenders import contenders
from hypothesis import given
from operations import Call
from tally import examples, tally

import guard_ops as go


@pytest.mark.parametrize("op", ["guard_loss", "guard_loss_and_grad"])
@examples(share=0.2)
@given(drawn=strategies.losses())
def test_loss_gradient_and_diagnostics_are_the_truth(op, drawn):
    case, config, options = drawn
    arguments = build.loss_arguments(case, config, options)
    factor = options["factor"] if op == "guard_loss" else 1.0
    try:
        expected = truth_loss.loss(arguments, config, factor)
    except truth.UndecidedError:
        expected = None
    call = Call(op, arguments, factor)
    counts = {}
    for contender in contenders():
        if not contender.takes(arguments):
            continue
        got = contender.run(call)
        counts[contender.name] = got["nonfinite"].tolist()
        if config.nonfinite == "drop":
            assert got["loss"].isfinite(), f"{contender.name}: the loss is {got['loss']}"
        if expected is not None:
            wrong = differences(got, expected)
            assert not wrong, f"{contender.name}: " + "; ".join(wrong)
        tally(op, contender.name, decided=expected is not None)
    assert len({str(x) for x in counts.values()}) == 1, counts
