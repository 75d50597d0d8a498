"""The accuracy benchmark's own float64 truth."""

import pytest
import torch

import guard_ops as go
from benchmarks import accuracy, contenders
from benchmarks.workloads import Workload

SMALL = Workload("small", "none", (64, 16), 8, 2, "none")


@pytest.mark.parametrize("form", ["velocity", "noise"])
def test_truth_is_the_reference_backend_in_float64(form):
    inputs = contenders.make_inputs(SMALL, drift=1e-2)
    operands = {
        name: getattr(inputs, name).double()
        for name in contenders.READS[form]
        if name != "model_output"
    }
    with go.use_backend("reference"):
        out = go.guard_loss(
            inputs.model_output.detach().double(),
            advantages=inputs.advantages,
            coeffs=inputs.coeffs,
            **operands,
        )
    torch.testing.assert_close(
        accuracy.exact_excess(inputs, form), out.excess, rtol=1e-9, atol=1e-9
    )


def test_errors_are_those_of_each_contender():
    found = {
        row.contender: row for row in accuracy.measure_accuracy(SMALL, torch.float32, drift=1e-3)
    }
    ours = found["guard_ops, velocity form"]
    assert ours.max_error < 1e-5  # no subtraction of log-probs
    assert ours.wrong_clips == 0
    assert found[accuracy.PLAIN].max_error > 100 * ours.max_error


def test_a_clip_decision_is_a_side_of_the_range():
    sides = accuracy._side(torch.tensor([-0.3, -0.1, 0.1, 0.3]))
    assert sides.tolist() == [-1, 0, 0, 1]
