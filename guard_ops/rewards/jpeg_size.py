"""Small JPEG files are good: the field's smoke test, as it needs no model and is soon learnt."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..trainer.extras import require

QUALITY = 95


def jpeg_size(
    pixels: Tensor,  # [B, 3, H, W] or [B, F, 3, H, W] in [0, 1]
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
) -> Tensor:
    """Minus the kibibytes of each image, or of a video's frames on average, as JPEG; [B]."""
    bytes_ = (pixels * 255).round().clamp(0, 255).to("cpu", torch.uint8)
    frames = bytes_ if bytes_.ndim == 5 else bytes_.unsqueeze(1)
    sizes = [[_size(frame) for frame in video] for video in frames]
    return -torch.tensor(sizes, dtype=torch.float32).mean(1) / 1024


def _size(image: Tensor) -> int:
    pillow = require("PIL.Image", "models")
    buffer = io.BytesIO()
    pillow.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(
        buffer, format="JPEG", quality=QUALITY
    )
    return buffer.tell()
