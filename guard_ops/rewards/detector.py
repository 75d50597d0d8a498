"""Objects in images: Mask2Former through transformers, as the official GenEval has it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..trainer.extras import require
from .clip import dtype_of
from .weights import Weights

MODEL = "facebook/mask2former-swin-small-coco-instance"
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator",
    "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""COCO's 80 classes in its order, named as GenEval's prompts name them."""

_SHORTER, _LONGER, _MULTIPLE = 800, 1333, 32
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_QUERIES = 100  # the surest pairs of query and class


class Detection(NamedTuple):
    """An object that was found."""

    box: tuple[float, float, float, float]  # left, top, right, bottom, in pixels
    score: float  # 0 to 1
    mask: Tensor | None = None  # bool [H, W]


Detections = dict[str, list[Detection]]
"""What was found in an image, by class."""


class Mask2Former:
    """Finds instances of COCO's classes.

    Args:
        model: a folder with a Mask2Former, or an id of the hub.
        dtype: "float32", "bfloat16" or "float16".
    """

    def __init__(self, model: str = MODEL, dtype: str = "float32") -> None:
        self._dtype = dtype_of("geneval", dtype)
        files = ("config.json", "*.safetensors")
        self._weights = Weights("geneval", "model", model, files, MODEL).check()
        self._model: Any = None

    def fetch(self) -> None:
        """Download what is not there; nothing is loaded."""
        self._weights.fetch()

    def prepare(self, device: torch.device) -> Any:
        """The loaded model.

        Raises:
            ValueError: it is of other classes than COCO's.
        """
        if self._model is None or self._model.device != device:
            kind = require("transformers", "rewards").Mask2FormerForUniversalSegmentation
            model = kind.from_pretrained(
                self._weights.fetch(), use_safetensors=True, dtype=self._dtype
            )
            if model.config.num_labels != len(CLASSES):
                raise ValueError(
                    f"`model` of the reward geneval is {self._weights.model!r}, which knows "
                    f"{model.config.num_labels} classes; it needs COCO's {len(CLASSES)}"
                )
            self._model = model.to(device).eval().requires_grad_(False)
        return self._model

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Detections]:
        """What is in each of the images [B, 3, H, W] in [0, 1]."""
        model = self.prepare(images.device)
        pixels, mask, inside = prepare(images)
        out = model(pixel_values=pixels.to(self._dtype), pixel_mask=mask)
        padded = pixels.shape[-2:]
        return [
            detections(classes.float(), masks.float(), padded, inside, images.shape[-2:])
            for classes, masks in zip(
                out.class_queries_logits, out.masks_queries_logits, strict=True
            )
        ]


def prepare(images: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """The detector's input, its mask of pixels, and the size of the image in it.

    The shorter side becomes 800, the longer one at most 1333; sides are filled up with zeros, of
    normalized pixels, to multiples of 32.
    """
    height, width = images.shape[-2:]
    scale = min(_SHORTER / min(height, width), _LONGER / max(height, width))
    inside = round(height * scale), round(width * scale)
    resized = F.interpolate(images, inside, mode="bilinear", antialias=True, align_corners=False)
    mean, std = (images.new_tensor(x)[:, None, None] for x in (_MEAN, _STD))
    bottom, right = (-side % _MULTIPLE for side in inside)
    pixels = F.pad((resized - mean) / std, (0, right, 0, bottom))
    mask = torch.zeros(len(images), *pixels.shape[-2:], dtype=torch.long, device=images.device)
    mask[:, : inside[0], : inside[1]] = 1
    return pixels, mask, inside


def detections(
    class_logits: Tensor,  # [Q, 81], the last of nothing
    mask_logits: Tensor,  # [Q, h, w]
    padded: tuple[int, ...],  # the size of what the masks are of
    inside: tuple[int, int],  # of the image in it
    size: tuple[int, ...],  # of the image itself
) -> Detections:
    """The objects of an image: the surest pairs of query and class.

    A score is the class's probability times the mean probability of the mask inside itself.
    """
    probability = class_logits.softmax(-1)[:, :-1]
    count = min(_QUERIES, probability.numel())
    scores, pairs = probability.flatten().topk(count)
    queries, kinds = pairs // probability.shape[1], pairs % probability.shape[1]
    masks = F.interpolate(mask_logits[None], padded, mode="bilinear", align_corners=False)
    masks = masks[..., : inside[0], : inside[1]]
    masks = F.interpolate(masks, size, mode="bilinear", align_corners=False)[0]
    found: Detections = {}
    for score, query, kind in zip(scores.tolist(), queries.tolist(), kinds.tolist(), strict=True):
        logits = masks[query]
        mask = logits > 0
        if not mask.any():
            continue
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        box = (
            float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1),
        )  # fmt: skip
        sure = score * float(logits[mask].sigmoid().mean())
        found.setdefault(CLASSES[kind], []).append(Detection(box, sure, mask))
    return found
