"""Which backend runs: what one thread asks for is nothing to another one."""

import contextvars
import threading

import pytest
import torch

import guard_ops as go
from guard_ops import backends

CPU = torch.device("cpu")
FASTEST = backends.select(CPU).NAME


def in_a_thread(function):
    """What ``function`` returns in a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join(10)
    return found[0]


def chosen():
    return backends.select(CPU).NAME


def test_blocks_that_overlap_in_two_threads_end_as_they_began():
    """The second block begins before the first ends, and ends after it."""
    begun, ended = threading.Event(), threading.Event()
    seen = []

    def second():
        with go.use_backend("reference"):
            begun.set()
            assert ended.wait(10)
            seen.append(chosen())
        seen.append(chosen())

    thread = threading.Thread(target=second)
    with go.use_backend("reference"):
        thread.start()
        assert begun.wait(10)
    ended.set()
    thread.join(10)
    assert seen == ["reference", FASTEST]
    assert chosen() == FASTEST


def test_a_choice_is_its_thread_s_own():
    with go.use_backend("reference"):
        assert chosen() == "reference"
        assert in_a_thread(chosen) == FASTEST
        copied = contextvars.copy_context()
        assert in_a_thread(lambda: copied.run(chosen)) == "reference"


def test_blocks_nest():
    with go.use_backend("reference"):
        with go.use_backend(None):
            assert chosen() == FASTEST
        assert chosen() == "reference"
    assert chosen() == FASTEST


@pytest.mark.parametrize("name", ["gpu", [], 3])
def test_what_names_no_backend_is_refused(name):
    with pytest.raises(ValueError, match=r"`name` is .*: there is no such backend; available: "):
        go.use_backend(name)
