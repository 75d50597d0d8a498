"""LAION's improved aesthetic predictor: what people rated, from CLIP-L's embedding of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..trainer.extras import require
from . import clip
from .clip_score import MODEL as CLIP
from .frames import frames_of
from .weights import Weights

HEAD = "trl-lib/ddpo-aesthetic-predictor"
_WIDTHS = (1024, 128, 64, 16, 1)


class Aesthetic:
    """The predicted rating, about 1 to 10, whatever the prompt; a video's frames on average.

    Args:
        model: a folder of the CLIP-L/14, or an id of the hub.
        head: a folder with the predictor's weights, or an id of the hub: a .safetensors file, or
            a .pth file, of which only tensors are read.
        dtype: of CLIP: "float32", "bfloat16" or "float16".

    Raises:
        ValueError: of a model that is not there, or another dtype.
    """

    name = "aesthetic"

    def __init__(self, model: str = CLIP, head: str = HEAD, dtype: str = "float32") -> None:
        self._dtype = clip.dtype_of(self.name, dtype)
        files = (*clip.MODEL, *clip.TOKENIZER)
        self._weights = Weights(self.name, "model", model, files, CLIP, clip.TOKENIZER_ALSO).check()
        tensors = "*.safetensors" if any(Path(head).expanduser().glob("*.safetensors")) else "*.pth"
        self._head = Weights(self.name, "head", head, (tensors,), HEAD).check()
        self._loaded: tuple[clip.Clip, nn.Sequential] | None = None

    def fetch(self) -> None:
        """Download what is not there; nothing is loaded."""
        self._weights.fetch()
        self._head.fetch()

    def prepare(self, device: torch.device) -> tuple[clip.Clip, nn.Sequential]:
        """The loaded CLIP and head."""
        if self._loaded is None or self._loaded[0].device != device:
            folder = self._weights.fetch()
            towers = clip.Clip(folder, folder, device, self._dtype)
            self._loaded = towers, _head(self._head.fetch(), towers.width).to(device)
        return self._loaded

    def __call__(
        self, pixels: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Tensor:
        """[B], of pixels [B, 3, H, W] or [B, F, 3, H, W] in [0, 1]."""
        frames = frames_of(pixels, prompts, metadata)
        towers, head = self.prepare(pixels.device)
        with torch.no_grad():
            return frames.mean(head(towers.images(frames.images))[:, 0])


def _head(folder: Path, width: int) -> nn.Sequential:
    """Five linear maps in a row, with nothing between them but what training dropped out.

    Raises:
        ValueError: the file has other tensors.
    """
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.pth"))
    if found[0].suffix == ".safetensors":
        tensors = require("safetensors.torch", "rewards").load_file(found[0])
    else:
        tensors = torch.load(found[0], map_location="cpu", weights_only=True)
    modules: list[nn.Module] = []
    before = width
    for after in _WIDTHS:
        modules += [nn.Linear(before, after), nn.Identity()]  # dropout, which is for training
        before = after
    del modules[-3], modules[-1]  # the last two maps have none between and behind them
    head = nn.Sequential(*modules)
    try:
        head.load_state_dict({n.removeprefix("layers."): x.float() for n, x in tensors.items()})
    except RuntimeError as error:
        raise ValueError(
            f"{found[0]} has not the weights of {HEAD}, for CLIP embeddings of {width}: {error}"
        ) from error
    return head.eval().requires_grad_(False)
