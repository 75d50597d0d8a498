"""B == 1 under standardize: plain GRPO, and one warning in the life of a process."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from problems import EXACT_ON_POLICY, FORMS, problem, relative, run

import guard_ops as go
from guard_ops import loss


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("steps", [None, 3])
def test_a_batch_of_one_standardizes_to_plain_grpo_and_warns_once(form, steps, backend):
    given = problem(form, steps=steps, batch=1, drift=0.2 if form != "mean" else 0.3)
    loss._warned_single = False
    with pytest.warns(RuntimeWarning, match="standardize over a batch of one sample") as caught:
        out, grad = run(given, go.GuardConfig(clip_low=0.2, clip_high=0.2))
    assert len(caught) == 1
    assert Path(caught[0].filename).name == "problems.py"  # the line that called guard_loss
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(given, go.GuardConfig())
    # r_hat = 1 + u - mean(u) = 1, so the gradient is that of -A r: plain GRPO's, unclipped.
    assert torch.equal(out.excess, torch.zeros_like(out.excess))
    _, plain = run(given, go.GuardConfig("none", clip_low=math.inf, clip_high=math.inf))
    assert relative(grad, plain) < 1e-12


@pytest.mark.parametrize("form", EXACT_ON_POLICY)
def test_a_batch_of_one_needs_no_warning_where_nothing_is_standardized(form, backend):
    loss._warned_single = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(problem(form, batch=1), go.GuardConfig.paper())
        statistics = go.RatioStatistics(3).update(torch.randn(3, 8))
        run(problem(form, batch=1), go.GuardConfig(), statistics=statistics)
        run(problem(form, batch=2), go.GuardConfig())
    assert not loss._warned_single
