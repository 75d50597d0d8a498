"""Which backend runs: what one thread asks for while another one is looking."""

import threading

import pytest
import torch

import guard_ops as go
from guard_ops import backends

CPU = torch.device("cpu")


@pytest.mark.skipif("cpu" not in go.available_backends(), reason="there is one backend alone")
def test_a_choice_is_remembered_for_what_was_asked_then(monkeypatch):
    looking, left = threading.Event(), threading.Event()
    monkeypatch.setattr(backends, "_chosen", {})
    found, original = [], backends._find

    def slow(*asked):
        module = original(*asked)
        looking.set()
        assert left.wait(10)
        return module

    with go.use_backend("reference"):
        monkeypatch.setattr(backends, "_find", slow)
        thread = threading.Thread(target=lambda: found.append(backends.select(CPU).NAME))
        thread.start()
        assert looking.wait(10)
    left.set()
    thread.join()
    monkeypatch.setattr(backends, "_find", original)
    assert found == ["reference"]
    assert backends.select(CPU).NAME != "reference"
    with go.use_backend("reference"):
        assert backends.select(CPU).NAME == "reference"
