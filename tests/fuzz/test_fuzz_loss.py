"""guard_loss and guard_loss_and_grad of every backend and instruction set against the truth."""

import pytest
import strategies
import truth_loss
from compare import agree
from hypothesis import given
from operations import Call
from tally import examples

import build

pytestmark = pytest.mark.filterwarnings("ignore:guard_ops. standardize over a batch of one")


@pytest.mark.parametrize("op", ["guard_loss", "guard_loss_and_grad"])
@examples(share=0.13)
@given(drawn=strategies.losses())
def test_loss_gradient_and_diagnostics_are_the_truth(op, drawn):
    case, config, options = drawn
    arguments = build.loss_arguments(case, config, options)
    factor = options["factor"] if op == "guard_loss" else 1.0
    results = agree(Call(op, arguments, factor), lambda: truth_loss.loss(arguments, config, factor))
    # Where rounding alone decides what is finite, `agree` compares nothing, and this still holds.
    if config.nonfinite == "drop":
        losses = {name: got["loss"].item() for name, got in results}
        assert all(got["loss"].isfinite() for _, got in results), losses
