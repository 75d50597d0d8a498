"""CLIP's two towers through transformers; images are prepared by torch, on any device.

Nothing here needs torchvision or Pillow: the CLIP models that rewards use all resize the shorter
side bicubically, cut out the centre, and normalize with the same six numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..trainer.extras import require

MODEL = ("config.json", "*.safetensors")
TOKENIZER = ("tokenizer_config.json",)
TOKENIZER_ALSO = ("tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json")
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Clip:
    """A CLIP model and its tokenizer.

    Args:
        model: folder with the weights.
        tokenizer: folder with the tokenizer's files.
        dtype: of the weights; embeddings are float32.
    """

    def __init__(
        self, model: Path, tokenizer: Path, device: torch.device, dtype: torch.dtype
    ) -> None:
        transformers = require("transformers", "rewards")
        self._tokenizer = transformers.CLIPTokenizer.from_pretrained(tokenizer)
        self._model: Any = transformers.CLIPModel.from_pretrained(
            model, use_safetensors=True, dtype=dtype
        )
        self._model.to(device).eval().requires_grad_(False)
        self.device, self._dtype = device, dtype
        self._size = self._model.config.vision_config.image_size

    @property
    def scale(self) -> Tensor:
        """exp(logit_scale), [], float32: what cosines are multiplied with."""
        scale: Tensor = self._model.logit_scale.float().exp()
        return scale

    @property
    def width(self) -> int:
        """Of an embedding."""
        return int(self._model.config.projection_dim)

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """Embeddings of length 1, [N, width], of images [N, 3, H, W] in [0, 1]."""
        pixels = prepare(images.to(self.device), self._size).to(self._dtype)
        pooled = self._model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self._model.visual_projection(pooled).float(), dim=-1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of length 1, [N, width]; a text longer than 77 tokens is cut off."""
        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=77, return_tensors="pt"
        ).to(self.device)
        pooled = self._model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return F.normalize(self._model.text_projection(pooled).float(), dim=-1)


def prepare(images: Tensor, size: int) -> Tensor:
    """CLIP's input [N, 3, size, size]: the shorter side resized, the centre cut out, normalized."""
    height, width = images.shape[-2:]
    shorter = min(height, width)
    resized = (size * height // shorter, size * width // shorter)
    small = F.interpolate(images, resized, mode="bicubic", antialias=True, align_corners=False)
    top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
    cut = small[..., top : top + size, left : left + size].clamp(0, 1)
    mean, std = (cut.new_tensor(x)[:, None, None] for x in (MEAN, STD))
    return (cut - mean) / std


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(reward: str, name: str) -> torch.dtype:
    """Raises ValueError for a name that is no dtype of weights."""
    if name not in DTYPES:
        raise ValueError(
            f"`dtype` of the reward {reward} is {name!r}; it needs one of {', '.join(DTYPES)}"
        )
    return DTYPES[name]
