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


@pytest.mark.slow_suite  # it counts the parameters of five whole networks
def test_the_page_is_what_the_script_writes(script):
    assert script.PAGE.read_text() == script.page(), "python scripts/scale_page.py"


def test_sharding_is_chosen_by_what_fits(script, monkeypatch):
    flux = next(m for m in script.MODELS if m.name == "FLUX.1-dev")
    about = script.Counts(whole=12_000_000_000, lora=180_000_000, block=340_000_000)
    monkeypatch.setattr(script, "counts", lambda *_: about)
    assert script.sharding(flux, 1, full=False) == "ddp"
    assert script.sharding(flux, 1, full=True) == "more GPUs"
    assert script.sharding(flux, 8, full=True) == "fsdp"
    assert script.total(flux, 8, full=True, sharded=True) < script.total(
        flux, 1, full=True, sharded=True
    )
