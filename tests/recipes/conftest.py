from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="recipes of backbones need guard-ops[models]")
pytest.importorskip("peft", reason="recipes of backbones need guard-ops[models]")

import tiny_pipelines

RECIPES = {
    "sd3_5_medium": "sd3",
    "flux1_dev": "flux",
    "wan2_1_t2v_1_3b": "wan",
    "qwen_image": "qwen",
}


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny pipeline, by the name of its recipe."""
    root = tmp_path_factory.mktemp("models")
    return lambda recipe: tiny_pipelines.built(root, RECIPES[recipe])


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red cube\n\nthe lazy dog\n")
    return path


@pytest.fixture(scope="session")
def tiny_words(
    model: Callable[[str], Path], prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[str]]:
    """What makes a recipe run in seconds: its model a tiny one, and few small samples."""
    encodings = tmp_path_factory.mktemp("encodings")

    def words(recipe: str, **changes: object) -> list[str]:
        values = {
            "model": model(recipe),
            "prompts": prompts,
            "encodings": encodings,
            "iterations": 2,
            "prompts_per_iteration": 2,
            "group_size": 2,
            "rollout_batch": 2,
            "height": 32,
            "width": 32,
            "frames": 5 if recipe == "wan2_1_t2v_1_3b" else 1,
            "steps": 4,
            "text_length": 24,
            "window_size": "null",
            "lora_rank": 4,
            "learning_rate": 1e-3,
            "evaluation_steps": 2,
            "evaluation_prompts": 1,
            "evaluate_every": 2,
            "checkpoint_every": 2,
        }
        return [f"{key}={value}" for key, value in {**values, **changes}.items()]

    return words
