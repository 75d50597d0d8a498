"""Pictures of text, in a font that comes with matplotlib."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor


def drawn(text: str, size: int = 32, page: tuple[int, int] | None = None) -> Tensor:
    """Black on white, [3, H, W] in [0, 1]; without ``page`` the image is that of one line."""
    np, matplotlib = pytest.importorskip("numpy"), pytest.importorskip("matplotlib")
    image, draw, fonts = (
        pytest.importorskip(f"PIL.{name}") for name in ("Image", "ImageDraw", "ImageFont")
    )
    font = fonts.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)
    if page is None:
        _, _, right, bottom = font.getbbox(text)
        canvas, place = image.new("RGB", (right + 16, bottom + 16), "white"), (8, 8)
    else:
        canvas, place = image.new("RGB", page, "white"), (page[0] // 8, page[1] // 4)
    draw.Draw(canvas).multiline_text(place, text, font=font, fill="black")
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255
