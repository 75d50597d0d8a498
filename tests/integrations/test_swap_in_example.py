"""examples/swap_in.py runs and says what docs/swap-in.md says it does."""

from __future__ import annotations

import re
from pathlib import Path

import fresh

EXAMPLE = Path(__file__).parents[2] / "examples" / "swap_in.py"


def test_the_swap_changes_nothing_but_digits_time_and_memory():
    printed = fresh.run(EXAMPLE.read_text())
    numbers = re.findall(r"([0-9.]+e[+-][0-9]+)", printed.splitlines()[0])
    losses, weights = map(float, numbers)
    assert losses < 1e-5
    assert weights < 1e-4
    assert "ratio is 1 + 0.0" in printed
