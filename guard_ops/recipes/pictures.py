"""Grids of images or videos at fixed seeds, as files."""

from __future__ import annotations

import io
import math
from pathlib import Path

import torch
from torch import Tensor

from ..trainer.extras import require
from ..trainer.folder import write_whole

FRAMES_PER_SECOND = 16


def grid(pixels: Tensor) -> Tensor:
    """[B, 3, H, W] or [B, F, 3, H, W] in [0, 1] as uint8 [F, H', W', 3], near a square."""
    videos = pixels if pixels.ndim == 5 else pixels.unsqueeze(1)
    count, frames, channels, height, width = videos.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = torch.ones(rows * columns, frames, channels, height, width)
    sheet[:count] = videos.float().cpu()
    sheet = sheet.reshape(rows, columns, frames, channels, height, width)
    sheet = sheet.permute(2, 0, 4, 1, 5, 3).reshape(
        frames, rows * height, columns * width, channels
    )
    return (sheet * 255).round().clamp(0, 255).to(torch.uint8)


def write_grid(pixels: Tensor, path: Path) -> Path:
    """Write ``path`` with .png, or with .gif for videos; returns what was written."""
    pillow = require("PIL.Image", "models")
    frames = [pillow.fromarray(frame.numpy()) for frame in grid(pixels)]
    buffer = io.BytesIO()
    if len(frames) == 1:
        path = path.with_suffix(".png")
        frames[0].save(buffer, format="PNG")
    else:
        path = path.with_suffix(".gif")
        frames[0].save(
            buffer,
            format="GIF",
            save_all=True,
            append_images=frames[1:],
            duration=round(1000 / FRAMES_PER_SECOND),
            loop=0,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, buffer.getvalue())
    return path
