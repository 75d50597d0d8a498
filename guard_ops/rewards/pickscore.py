"""PickScore (arXiv:2305.01569): a CLIP-H that was fitted to which of two images people picked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import clip
from .frames import frames_of
from .weights import Weights

MODEL = "yuvalkirstain/PickScore_v1"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_NEAR = 26.0  # what the score of a good image is near; flow_grpo divides by it too


class PickScore:
    """``exp(logit_scale) cos(image, prompt) / 26``; a video's frames on average.

    Args:
        model: a folder with PickScore's weights, or an id of the hub.
        tokenizer: a folder of its tokenizer, or an id of the hub; default: ``model``, if that is a
            folder that has one, else the CLIP-H it was made from.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        ValueError: of a model that is not there, or another dtype.
    """

    name = "pickscore"

    def __init__(self, model: str = MODEL, tokenizer: str = "", dtype: str = "float32") -> None:
        self._dtype = clip.dtype_of(self.name, dtype)
        self._weights = Weights(self.name, "model", model, clip.MODEL, MODEL).check()
        if not tokenizer:
            folder = Path(model).expanduser()
            own = self._weights.local and (folder / clip.TOKENIZER[0]).exists()
            tokenizer = model if own else TOKENIZER
        self._tokenizer = Weights(
            self.name, "tokenizer", tokenizer, clip.TOKENIZER, TOKENIZER, clip.TOKENIZER_ALSO
        ).check()
        self._clip: clip.Clip | None = None

    def fetch(self) -> None:
        """Download what is not there; nothing is loaded."""
        self._weights.fetch()
        self._tokenizer.fetch()

    def prepare(self, device: torch.device) -> clip.Clip:
        """The loaded model."""
        if self._clip is None or self._clip.device != device:
            self._clip = clip.Clip(
                self._weights.fetch(), self._tokenizer.fetch(), device, self._dtype
            )
        return self._clip

    def __call__(
        self, pixels: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Tensor:
        """[B], of pixels [B, 3, H, W] or [B, F, 3, H, W] in [0, 1]."""
        frames = frames_of(pixels, prompts, metadata)
        towers = self.prepare(pixels.device)
        cosine = (towers.images(frames.images) * towers.texts(frames.of(prompts))).sum(-1)
        return frames.mean(towers.scale * cosine / _NEAR)
