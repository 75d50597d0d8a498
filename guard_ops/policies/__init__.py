"""Diffusers pipelines as flow policies: one backbone a file."""

from .encodings import Encodings
from .flux import FluxPolicy
from .loading import ModelError, ModelFolder, look
from .lora import TARGETS, add_lora
from .pipeline import PipelinePolicy, PolicySettings
from .qwen_image import QwenImagePolicy
from .sd3 import SD3Policy
from .wan import WanPolicy

POLICIES: dict[str, type[PipelinePolicy]] = {
    kind.pipeline: kind for kind in (SD3Policy, FluxPolicy, WanPolicy, QwenImagePolicy)
}

__all__ = [
    "POLICIES",
    "TARGETS",
    "Encodings",
    "FluxPolicy",
    "ModelError",
    "ModelFolder",
    "PipelinePolicy",
    "PolicySettings",
    "QwenImagePolicy",
    "SD3Policy",
    "WanPolicy",
    "add_lora",
    "look",
]
