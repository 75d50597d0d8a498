"""CLIPScore (arXiv:2104.08718) of an image and its prompt: 100 times the cosine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import clip
from .frames import frames_of
from .weights import Weights

MODEL = "openai/clip-vit-large-patch14"


class ClipScore:
    """100 times the cosine of CLIP's embeddings of image and prompt; a video's frames on average.

    Nothing is cut off at 0, as a reward needs its slope.

    Args:
        model: a folder of a CLIP with its tokenizer, or an id of the hub.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        ValueError: of a model that is not there, or another dtype.
    """

    name = "clip_score"
    factor = 100.0

    def __init__(self, model: str = MODEL, dtype: str = "float32") -> None:
        self._dtype = clip.dtype_of(self.name, dtype)
        files = (*clip.MODEL, *clip.TOKENIZER)
        self._weights = Weights(
            self.name, "model", model, files, MODEL, clip.TOKENIZER_ALSO
        ).check()
        self._clip: clip.Clip | None = None

    def fetch(self) -> None:
        """Download what is not there; nothing is loaded."""
        self._weights.fetch()

    def prepare(self, device: torch.device) -> clip.Clip:
        """The loaded model."""
        if self._clip is None or self._clip.device != device:
            folder = self._weights.fetch()
            self._clip = clip.Clip(folder, folder, device, self._dtype)
        return self._clip

    def __call__(
        self, pixels: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Tensor:
        """[B], of pixels [B, 3, H, W] or [B, F, 3, H, W] in [0, 1]."""
        frames = frames_of(pixels, prompts, metadata)
        towers = self.prepare(pixels.device)
        cosine = (towers.images(frames.images) * towers.texts(frames.of(prompts))).sum(-1)
        return frames.mean(self.factor * cosine)
