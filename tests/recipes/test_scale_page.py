"""docs/scale.md is what its script writes, and its table is that of the published models."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import scale_page

    yield scale_page
    sys.modules.pop("scale_page")


def test_the_page_is_what_the_script_writes(script):
    assert script.PAGE.read_text() == script.page(), "python scripts/scale_page.py"


def test_sharding_is_chosen_by_what_fits(script):
    sd3, flux, *_ = script.MODELS
    assert script.sharding(sd3, 1, full=False) == "ddp"
    assert script.sharding(flux, 1, full=True) == "more GPUs"
    assert script.sharding(flux, 8, full=True) == "fsdp"
    assert script.total(flux, 8, full=True, sharded=True) < script.total(
        flux, 1, full=True, sharded=True
    )
