"""A process that was forked from one with threads, whose pool of threads OpenMP would wait for."""

import os
import signal
import sys
import warnings

import pytest
import torch
from problems import problem

import guard_ops as go

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or "cpu" not in go.available_backends(), reason="no threads of ours"
)


def in_a_child(function):
    """The exit status of a forked child that ran ``function``; it is killed after a minute."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(60)
            status = 0 if function() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_computes_the_same_bits_and_does_not_wait_for_threads_it_has_not():
    torch.set_num_threads(4)
    given = problem("noise", latent=(300, 300), dtype=torch.float32)
    v = given.pop("model_output").requires_grad_()

    def gradient():
        loss = go.guard_loss(v, **given).loss
        return torch.autograd.grad(3 * loss, v)[0]  # 3: the gradient is scaled, by torch's threads

    with go.use_backend("cpu"):
        expected = gradient()
        assert in_a_child(lambda: torch.equal(gradient(), expected)) == 0
        assert in_a_child(lambda: torch.get_num_threads() == 4) == 0  # until an op runs
        assert in_a_child(lambda: gradient().sum() != 0 and torch.get_num_threads() == 1) == 0
        assert in_a_child(lambda: warned(gradient)) == 0
    assert torch.get_num_threads() == 4


def warned(function):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        function()
    return ["was forked from one with threads" in str(one.message) for one in seen] == [True]
