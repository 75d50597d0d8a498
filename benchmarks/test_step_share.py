"""Measures the share of a training step that the loss takes, without guard_ops and with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks import step_share, suite

BACKENDS = suite.choose_backends(None)
DEVICE = suite.choose_device(BACKENDS)


@pytest.mark.parametrize("model", step_share.MODELS, ids=lambda model: model.name)
def test_share(model: step_share.Model, record: Callable[..., None]) -> None:
    try:
        row = step_share.measure_share(model, BACKENDS[0], DEVICE)
    except ModuleNotFoundError as error:
        record("share", {"model": model.name, "skipped": str(error)}, DEVICE.type)
        pytest.skip(str(error))
    record("share", row, DEVICE.type)
    assert 0 < row["loss_after_ms"] < row["loss_before_ms"]
