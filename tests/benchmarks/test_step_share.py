"""The share of a step: what is built, and that both losses train the same step."""

import sys

import pytest
import torch

from benchmarks import step_share, suite

CPU = torch.device("cpu")
BACKEND = suite.choose_backends(None)[0]
DIGITS = step_share.MODELS[-1]


def test_the_demos_model_is_measured_whole(monkeypatch):
    monkeypatch.setattr(step_share.measure, "peak_extra_bytes", lambda *_, **__: 2**20)
    row = step_share.measure_share(DIGITS, BACKEND, CPU)
    assert row["parameters"] == row["full_parameters"] > 500_000
    assert row["shape"] == [1, 80, 1, 8, 8]
    for name in ("before", "after"):
        assert row[f"loss_{name}_ms"] > 0
        assert row[f"step_{name}_ms"] > 0


def test_without_diffusers_a_model_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setattr(step_share, "MODELS", step_share.MODELS[:1])
    (row,) = step_share.measure_all(BACKEND, CPU, lambda *_: None)
    assert row["model"] == "SD3.5-M"
    assert 'pip install "guard-ops[bench]"' in row["skipped"]


@pytest.mark.parametrize("model", step_share.MODELS[:-1], ids=lambda model: model.name)
def test_models_keep_their_published_depth(model):
    pytest.importorskip("diffusers")
    network = step_share.build(model, whole=False)
    depth = {
        "SD3.5-M": lambda: len(network.transformer_blocks) == 24,
        "FLUX.1-dev": lambda: (
            (
                len(network.transformer_blocks),
                len(network.single_transformer_blocks),
            )
            == (19, 38)
        ),
        "Wan2.1 1.3B": lambda: len(network.blocks) == 30,
    }
    assert depth[model.name]()
    published = {"SD3.5-M": 2.2e9, "FLUX.1-dev": 11.9e9, "Wan2.1 1.3B": 1.42e9}
    # the checkpoints' own counts, to their two digits
    assert step_share.full_parameters(model) == pytest.approx(published[model.name], rel=0.03)
