"""The truth itself: its gradient against its loss, and whether a fault would be noticed."""

from collections import Counter

import strategies
import torch
import truth
import truth_loss
from compare import differences, mismatch
from hypothesis import assume, given
from operations import Call, run
from rounding import Rounded
from tally import examples

import build
import guard_ops as go


@examples(share=0.01)
@given(drawn=strategies.losses(poisoned=False))
def test_the_gradient_is_the_derivative_of_the_loss(drawn):
    case, config, options = drawn
    assume(config.balance != "inverse_ratio")  # whose weights are constants of the gradient
    assume(config.ratio_norm != "standardize" or not config.detach_stats)
    arguments = build.loss_arguments(case, config, options)
    v = arguments["model_output"].double().requires_grad_()
    try:
        expected = truth_loss.loss(arguments | {"model_output": v}, config)
    except truth.UndecidedError:
        assume(False)
    assume(bool(expected["loss"].value.isfinite()))
    (grad,) = torch.autograd.grad(expected["loss"].value, v)
    assume(bool(grad.isfinite().all()))  # torch's derivative of a std of 0 is not
    exact = Rounded(
        expected["grad"].value.detach(), expected["grad"].error, expected["grad"].format
    )
    wrong = mismatch("grad", grad, exact)
    assert not wrong, wrong


def test_a_result_that_is_off_by_a_thousandth_is_noticed():
    """In most cases; in the others it is what rounding may do."""
    noticed, tried = Counter(), Counter()
    names = ("loss", "grad", "log_ratio", "excess", "weights", "ratio_std", "kl_old")

    @examples(share=0.02)
    @given(drawn=strategies.losses(poisoned=False))
    def search(drawn):
        case, config, options = drawn
        assume(set(case.dtypes.values()) <= {torch.float32, torch.float64})
        arguments = build.loss_arguments(case, config, options)
        try:
            expected = truth_loss.loss(arguments, config)
        except truth.UndecidedError:
            return
        with go.use_backend("reference"):
            got = run(Call("guard_loss", arguments, 1.0))
        for name in names:
            if bool((expected[name].value.abs() > 1e-30).any()):
                tried[name] += 1
                changed = got | {name: got[name] * 1.001}
                noticed[name] += bool(differences(changed, {name: expected[name]}))

    search()
    assert all(noticed[name] > 0.5 * tried[name] > 0 for name in names), (noticed, tried)
