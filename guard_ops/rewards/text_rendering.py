"""Is the text that a prompt asks for in the image? Read by PP-OCR, compared by edit distance."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..trainer.policy import Scores
from .frames import frames_of
from .ppocr import Detector, Recognizer, model_in_wheel

_ASKED = re.compile(r"\"([^\"]+)\"|“([^”]+)”|(?<!\w)'([^']+)'(?!\w)")
_LINE = 2.5  # times as wide as high: an image of one line, in which nothing needs to be found


class TextRendering:
    """``1 - distance / longest`` of the text read and the text asked for, in [0, 1].

    ``distance`` is Levenshtein's of both without white space and case. The text asked for is the
    metadata's "text" or, as in flow_grpo, what the prompt has in quotation marks. A video's frames
    count on average. The part ``exact`` is 1 where both are the same. The engine runs on the CPU.

    Args:
        detect: whether lines are found first: "auto" (unless the image is 2.5 times as wide as
            high), "always" or "never" (it is one line).
        recognition, detection: files of PP-OCR models in ONNX's format; default: those in the
            wheel of ``rapidocr``.
        threads: of the engine.

    Raises:
        ValueError: an argument of no use. ModuleNotFoundError: the models' wheel is not installed.
    """

    name = "text_rendering"

    def __init__(
        self, detect: str = "auto", recognition: str = "", detection: str = "", threads: int = 1
    ) -> None:
        if detect not in ("auto", "always", "never"):
            raise ValueError(
                f"`detect` of the reward text_rendering is {detect!r}; it needs auto, always or "
                "never"
            )
        if threads < 1:
            raise ValueError(f"`threads` of the reward text_rendering is {threads}; it needs >= 1")
        self._how, self._threads = detect, threads
        self._files = {
            name: _file(name, path) for name, path in (("rec", recognition), ("det", detection))
        }
        self._read: Recognizer | None = None
        self._find: Detector | None = None

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """Raises ValueError for a prompt that asks for no text."""
        for prompt, row in zip(prompts, metadata, strict=True):
            text_of(prompt, row)

    def prepare(self, device: torch.device) -> tuple[Recognizer, Detector]:
        """The loaded models."""
        if self._read is None or self._find is None:
            self._read = Recognizer(self._files["rec"], self._threads)
            self._find = Detector(self._files["det"], self._threads)
        return self._read, self._find

    def read(self, image: Tensor) -> str:
        """The text in an image [3, H, W] in [0, 1]; lines with a space between them."""
        recognize, find = self.prepare(image.device)
        image = image.float().cpu()
        height, width = image.shape[-2:]
        if self._how == "never" or (self._how == "auto" and width >= _LINE * height):
            return recognize(image)
        found = [line.box for line in find(image)]
        texts = [recognize(image[:, top:bottom, left:right]) for left, top, right, bottom in found]
        return " ".join(text for text in texts if text)

    def __call__(
        self, pixels: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Scores:
        """[B], of pixels [B, 3, H, W] or [B, F, 3, H, W] in [0, 1].

        Raises:
            ValueError: a prompt asks for no text.
        """
        frames = frames_of(pixels, prompts, metadata)
        asked = frames.of([text_of(p, m) for p, m in zip(prompts, metadata, strict=True)])
        read = [self.read(image) for image in frames.images.cpu()]
        scores = [similarity(*pair) for pair in zip(read, asked, strict=True)]
        total = torch.tensor(scores, device=pixels.device)
        return Scores(frames.mean(total), {"exact": frames.mean((total == 1).float())})


def _file(kind: str, path: str) -> Path:
    if not path:
        return model_in_wheel(kind)
    found = Path(path).expanduser()
    if not found.is_file():
        name = {"rec": "recognition", "det": "detection"}[kind]
        raise ValueError(
            f"`{name}` of the reward text_rendering is {path!r}, which is no file; it needs a "
            "PP-OCR model in ONNX's format"
        )
    return found


def text_of(prompt: str, metadata: Mapping[str, Any]) -> str:
    """The text that a prompt asks for.

    Raises:
        ValueError: it asks for none.
    """
    text = metadata.get("text")
    found = _ASKED.search(prompt)
    if text is None and found:
        text = next(group for group in found.groups() if group)
    if not isinstance(text, str) or not _bare(text):
        raise ValueError(
            f"the prompt {prompt!r} asks for no text; the reward text_rendering needs it in "
            'quotation marks, or as the "text" of its metadata'
        )
    return text


def similarity(read: str, asked: str) -> float:
    """1 for the same text, 0 for one that has nothing of it."""
    read, asked = _bare(read), _bare(asked)
    return 1 - edit_distance(read, asked) / max(len(read), len(asked), 1)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: the fewest insertions, deletions and replacements that make b of a."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def _bare(text: str) -> str:
    return "".join(text.split()).casefold()
