"""What an update of the trainer costs, against a loop over the steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import trainer_update


def test_an_update_costs_a_forward_more_than_a_loop_and_the_first_none(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    ratios = trainer_update.times(str(tmp_path))["ratio"]
    for name, bound in trainer_update.BOUNDS.items():
        assert ratios[name] <= bound, (name, ratios)


def test_an_update_holds_velocities_beside_one_micro_batch(tmp_path: Path) -> None:
    """Of all steps and samples: recorded, recomputed and the loss's gradient; they are gone, but
    for the gradient, when activations are there."""
    pytest.importorskip("diffusers")
    bytes_of = trainer_update.memory(str(tmp_path))
    assert bytes_of["update"] - bytes_of["micro_batch"] <= 2 * bytes_of["velocities"], bytes_of
