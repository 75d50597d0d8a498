"""Videos as images: rewards of images judge every frame, and a video is the mean of its frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Frames(NamedTuple):
    """The images of B samples, F of each."""

    images: Tensor  # [B F, 3, H, W] in [0, 1], float32
    each: int  # F; 1 for images

    def of(self, values: Sequence[Any]) -> list[Any]:
        """A value of each sample for each of its images."""
        return [value for value in values for _ in range(self.each)]

    def mean(self, scores: Tensor) -> Tensor:
        """Of each sample, [B], from one of each image, [B F]."""
        return scores.reshape(-1, self.each).mean(1)


def frames_of(
    pixels: Tensor,  # [B, 3, H, W] or [B, F, 3, H, W]
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
) -> Frames:
    """The images to judge.

    Raises:
        ValueError: the pixels are no images, or not as many as the prompts.
    """
    if pixels.ndim not in (4, 5) or pixels.shape[-3] != 3:
        raise ValueError(
            f"`pixels` has shape {tuple(pixels.shape)}; it needs [B, 3, H, W] or [B, F, 3, H, W]"
        )
    if not len(pixels) == len(prompts) == len(metadata):
        raise ValueError(
            f"`pixels` has {len(pixels)} samples, with {len(prompts)} `prompts` and "
            f"{len(metadata)} `metadata`; it needs as many of each"
        )
    each = pixels.shape[1] if pixels.ndim == 5 else 1
    images = pixels.flatten(0, 1) if pixels.ndim == 5 else pixels
    return Frames(images.to(torch.float32).clamp(0, 1), each)


def to_bytes(images: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] on the CPU, as files of images have them."""
    found = (images * 255).round().clamp(0, 255).to("cpu", torch.uint8)
    return found.permute(0, 2, 3, 1).contiguous()
