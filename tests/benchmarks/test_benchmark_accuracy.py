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
        name: value.double() if torch.is_tensor(value) else value
        for name, value in inputs.form(form).items()
    }
    with go.use_backend("reference"):
        article, paper, raw = (
            go.guard_loss(
                inputs.model_output.detach().double(),
                advantages=inputs.advantages,
                config=config,
                **operands,
            )
            for config in (
                go.GuardConfig.article(),
                go.GuardConfig.paper(),
                go.GuardConfig.flow_grpo(),
            )
        )
    exact = accuracy.exact(inputs, form)
    for ours, expected in (
        (exact.log_ratio, article.log_ratio),
        (exact.standardized, article.excess),
        (exact.closed_form, paper.excess),
        (exact.raw, raw.excess),
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_errors_are_those_of_each_contender():
    found = {
        row.contender: row for row in accuracy.measure_accuracy(SMALL, torch.float32, drift=1e-3)
    }
    ours = found["guard_ops, velocity form"]
    assert ours.max_error < 1e-5  # no subtraction of log-probs
    assert ours.wrong_clips == 0
    assert ours.log_ratio_error < 1e-5
    assert ours.wrong_share == {"2e-6": 0, "1e-4": 0, "0.2": 0}
    assert found[accuracy.PLAIN].max_error > 100 * ours.max_error
    assert found[accuracy.PLAIN].log_ratio_error > 100 * ours.log_ratio_error


def test_a_clip_decision_is_a_side_of_the_range():
    sides = accuracy._side(torch.tensor([-0.3, -0.1, 0.1, 0.3]))
    assert sides.tolist() == [-1, 0, 0, 1]
