"""Error of the standardized ratio against float64 over drifts, [32, 4096, 64]."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from benchmarks.accuracy import DRIFTS, measure_accuracy
from benchmarks.results import Row, accuracy_row
from benchmarks.workloads import CI

WORKLOAD = dataclasses.replace(CI, name="accuracy", batch=32)
# The largest error at drift 1e-4 in float32. The mean form's stored mean is itself rounded to
# float32.
BOUNDS = {
    "guard_ops, velocity form": 1e-5,
    "guard_ops, noise form": 1e-5,
    "guard_ops, mean form": 2e-2,
}


@pytest.mark.parametrize("drift", DRIFTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_standardized_ratio(
    dtype: torch.dtype, drift: float, record: Callable[[str, Row], None]
) -> None:
    rows = measure_accuracy(WORKLOAD, dtype, drift)
    for row in rows:
        record("accuracy", accuracy_row(row))
    if dtype == torch.float32 and drift == 1e-4:
        errors = {row.contender: row.max_error for row in rows}
        missed = {name: errors[name] for name, bound in BOUNDS.items() if errors[name] > bound}
        assert not missed, f"max error of r_hat: {missed}, needs {BOUNDS}"
