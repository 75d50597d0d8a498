from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="the backbones need guard-ops[models]")
pytest.importorskip("peft", reason="the backbones need guard-ops[models]")

import tiny_pipelines

from guard_ops.policies import POLICIES, PipelinePolicy, PolicySettings, look

TEXT = {"sd3": 16, "flux": 16, "wan": 16, "qwen": 24}


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny pipeline, by name."""
    root = tmp_path_factory.mktemp("models")
    return lambda name: tiny_pipelines.built(root, name)


@pytest.fixture(scope="session")
def load(
    model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., PipelinePolicy]:
    """A policy of a tiny pipeline, as the real ones are loaded."""
    shared = tmp_path_factory.mktemp("encodings")

    def loaded(
        name: str, *, encodings: Path = shared, empty: bool = False, **changes: Any
    ) -> PipelinePolicy:
        values: dict[str, Any] = {
            "height": 32,
            "width": 48,
            "frames": 5 if name == "wan" else 1,
            "guidance_scale": 3.5,
            "text_length": TEXT[name],
            "dtype": torch.float32,
            "checkpointing": False,
        }
        found = look(str(model(name)), POLICIES)
        settings = PolicySettings(**values | changes)
        kind = POLICIES[found.pipeline]
        return kind.load(found, settings, encodings=encodings, empty=empty)

    return loaded
