"""The colour of an object, by CLIP: as GenEval asks, of a crop whose background is grey."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import clip
from .clip_score import MODEL
from .detector import Detection
from .weights import Weights

COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
)  # fmt: skip
_TEMPLATES = (
    "a photo of a {colour} {kind}",
    "a photo of a {colour}-colored {kind}",
    "a photo of a {colour} object",
)
_GREY = 0x99 / 255


class Colours:
    """Names colours.

    Args:
        model: a folder of a CLIP with its tokenizer, or an id of the hub.
        dtype: "float32", "bfloat16" or "float16".
    """

    def __init__(self, model: str = MODEL, dtype: str = "float32") -> None:
        self._dtype = clip.dtype_of("geneval", dtype)
        files = (*clip.MODEL, *clip.TOKENIZER)
        self._weights = Weights("geneval", "clip", model, files, MODEL, clip.TOKENIZER_ALSO).check()
        self._clip: clip.Clip | None = None
        self._known: dict[str, Tensor] = {}  # by class, [10, width]

    def fetch(self) -> None:
        """Download what is not there; nothing is loaded."""
        self._weights.fetch()

    def prepare(self, device: torch.device) -> clip.Clip:
        """The loaded model."""
        if self._clip is None or self._clip.device != device:
            folder = self._weights.fetch()
            self._clip, self._known = clip.Clip(folder, folder, device, self._dtype), {}
        return self._clip

    def __call__(self, image: Tensor, objects: Sequence[Detection], kind: str) -> list[str]:
        """The colour of each object, which are of the class ``kind``, in an image [3, H, W]."""
        towers = self.prepare(image.device)
        if kind not in self._known:
            texts = [t.format(colour=c, kind=kind) for c in COLOURS for t in _TEMPLATES]
            each = towers.texts(texts).unflatten(0, (len(COLOURS), len(_TEMPLATES)))
            self._known[kind] = F.normalize(each.mean(1), dim=-1)
        crops = torch.cat([towers.images(crop(image, each)[None]) for each in objects])
        return [COLOURS[row] for row in (crops @ self._known[kind].T).argmax(1).tolist()]


def crop(image: Tensor, found: Detection) -> Tensor:
    """The box of an object cut out of an image [3, H, W], grey where its mask says another's."""
    height, width = image.shape[-2:]
    left, top = (max(0, int(x)) for x in found.box[:2])
    right = min(width, max(left + 1, round(found.box[2])))
    bottom = min(height, max(top + 1, round(found.box[3])))
    if found.mask is not None:
        image = torch.where(found.mask.to(image.device), image, _GREY)
    return image[:, min(top, height - 1) : bottom, min(left, width - 1) : right]
