"""Every backend that drives a GPU, on one; Triton's kernels on the CPU, interpreted; and CUDA's, on
an emulated device."""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

import pytest
import torch

import guard_ops as go
from guard_ops.backends import select, use_backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = os.environ.get("GUARD_OPS_EMULATED") == "1"  # test_unusable_device.py copies this file


class Place(NamedTuple):
    """Where a test runs."""

    backend: str
    device: torch.device


def places() -> list[object]:
    """The interpreter's, the emulated one, and a GPU's with every backend but the plain one."""
    found: list[object] = []
    if EMULATED:
        found.append(pytest.param(Place("cuda", torch.device("cpu")), id="cuda-emulated"))
    if INTERPRETED and "triton" in go.available_backends():
        found.append(pytest.param(Place("triton", torch.device("cpu")), id="triton-interpreted"))
    for name in go.available_backends() if torch.cuda.is_available() and not INTERPRETED else ():
        with use_backend(name):
            try:
                select(torch.device("cuda"))
            except (ValueError, RuntimeError):  # RuntimeError: it cannot even be asked
                continue
        if name != "reference":
            place = Place(name, torch.device("cuda", 0))
            found.append(pytest.param(place, id=f"{name}-gpu", marks=pytest.mark.gpu))
    reason = "needs a GPU, TRITON_INTERPRET=1 or GUARD_OPS_EMULATED=1"
    return found or [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="nowhere")]


@pytest.fixture(params=places())
def place(request):
    """A backend, in use while the test runs, and its device."""
    with go.use_backend(request.param.backend):
        yield request.param


@pytest.fixture
def gpu(place):
    """A :class:`Place` that is a GPU."""
    if place.device.type == "cpu":
        pytest.skip("needs a GPU")
    return place


_unusable: list[str] = []


@pytest.hookimpl(tryfirst=True)  # the first to return a report would be the last
def pytest_runtest_makereport(item, call):
    """After a failure on a GPU: whether the process can still use it."""
    if call.excinfo is not None and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            _unusable.append(f"{item.nodeid} left the device unusable: {error}")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid, location):
    """An illegal access fails every later call of its process; xdist starts another one."""
    if _unusable and "PYTEST_XDIST_WORKER" in os.environ:
        print(_unusable[0], file=sys.__stderr__, flush=True)
        os._exit(1)
