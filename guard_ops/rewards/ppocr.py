"""PP-OCR through onnxruntime: the models that come in the wheel of ``rapidocr``, and no more of it.

Its API would also sort, turn and draw, at several times the time; the models need a resize before
and a decoding after.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..trainer.extras import require

_HEIGHT, _NARROWEST = 48, 320  # of a line that is read
_SIDE, _MULTIPLE = 736, 32  # the least shorter side of a page, and what its sides are multiples of
_LARGEST = 4.0  # by which a small page is scaled up
_PIXEL, _BOX, _GROWTH = 0.3, 0.5, 1.6  # thresholds of detection, and how far a box is grown
_PACKAGES = ("rapidocr", "rapidocr_onnxruntime")


class Line(NamedTuple):
    """A line of text on a page."""

    box: tuple[int, int, int, int]  # left, top, right, bottom, in pixels
    score: float


def model_in_wheel(kind: str) -> Path:
    """The file of the "rec" or "det" model in an installed package; nothing of it is imported.

    Raises:
        ModuleNotFoundError: no such package is installed; names what to install.
    """
    for package in _PACKAGES:
        found = importlib.util.find_spec(package)
        for folder in found.submodule_search_locations or () if found else ():
            files = sorted(Path(folder, "models").glob(f"*{kind}*.onnx"))
            if files:
                return files[-1]
    raise ModuleNotFoundError(
        "rapidocr, whose wheel has the PP-OCR models, is not installed; the reward text_rendering "
        'needs `pip install "guard-ops[rewards]"`',
        name="rapidocr",
    )


class _Model:
    """A model of one input and one output, on the CPU."""

    def __init__(self, path: Path, threads: int) -> None:
        runtime = require("onnxruntime", "rewards")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session: Any = runtime.InferenceSession(
            str(path), sess_options=options, providers=["CPUExecutionProvider"]
        )
        self._input = self.session.get_inputs()[0].name

    def __call__(self, image: Tensor) -> Tensor:
        """The output of one input, without its batch."""
        (found,) = self.session.run(None, {self._input: image[None].contiguous().numpy()})
        return torch.from_numpy(found[0])


class Recognizer:
    """Reads a line of text; one that is narrower than ``narrowest`` pixels at 48 high is padded."""

    def __init__(self, path: Path, threads: int = 1, narrowest: int = _NARROWEST) -> None:
        self._model, self._narrowest = _Model(path, threads), narrowest
        known = self._model.session.get_modelmeta().custom_metadata_map
        if "character" not in known:
            raise ValueError(f"{path} has no alphabet in its metadata; it is no PP-OCR recognizer")
        self._alphabet = ["", *known["character"].splitlines(), " "]  # the first is no character

    def __call__(self, image: Tensor) -> str:
        """The text in an image [3, h, w] in [0, 1] of one line."""
        width = max(1, round(image.shape[-1] * _HEIGHT / image.shape[-2]))
        line = F.interpolate(
            image[None].float().cpu(), (_HEIGHT, width), mode="bilinear", antialias=True
        )[0]
        line = F.pad(2 * line.clamp(0, 1) - 1, (0, max(0, self._narrowest - width)))
        return decoded(self._model(line).argmax(-1).tolist(), self._alphabet)


def decoded(best: Sequence[int], alphabet: Sequence[str]) -> str:
    """The text of the best class at each place, by greedy CTC: repetitions and blanks fall out."""
    text = [
        alphabet[now]
        for before, now in zip([0, *best], best, strict=False)
        if now != before and now < len(alphabet)
    ]
    return "".join(text).strip()


class Detector:
    """Finds lines of text on a page; upright ones, as boxes along the page's sides."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        self._model = _Model(path, threads)

    def __call__(self, image: Tensor) -> list[Line]:
        """The lines in an image [3, H, W] in [0, 1], from top to bottom and left to right."""
        height, width = image.shape[-2:]
        scale = max(1.0, min(_LARGEST, _SIDE / min(height, width)))
        size = [max(_MULTIPLE, round(x * scale / _MULTIPLE) * _MULTIPLE) for x in (height, width)]
        page = F.interpolate(image[None].float().cpu(), size, mode="bilinear", antialias=True)[0]
        chance = self._model(2 * page.clamp(0, 1) - 1)[0]
        return in_reading_order(boxes(chance, (height / size[0], width / size[1])))


def boxes(chance: Tensor, scale: tuple[float, float]) -> list[Line]:
    """The lines of a map [h, w] of the probability of text, in pixels of the page."""
    image = require("scipy.ndimage", "rewards")
    labels, _ = image.label((chance > _PIXEL).numpy())
    found = []
    for rows, columns in image.find_objects(labels):
        tall, wide = rows.stop - rows.start, columns.stop - columns.start
        score = float(chance[rows, columns].mean())
        if min(tall, wide) < 3 or score < _BOX:
            continue
        # the network marks the middle of a line; it grows by the ratio of area to circumference
        grow = tall * wide * _GROWTH / (2 * (tall + wide))
        top, left = max(0, rows.start - grow), max(0, columns.start - grow)
        bottom = min(chance.shape[0], rows.stop + grow)
        right = min(chance.shape[1], columns.stop + grow)
        box = (
            int(left * scale[1]), int(top * scale[0]),
            max(int(left * scale[1]) + 1, round(right * scale[1])),
            max(int(top * scale[0]) + 1, round(bottom * scale[0])),
        )  # fmt: skip
        found.append(Line(box, score))
    return found


def in_reading_order(lines: Sequence[Line]) -> list[Line]:
    """Rows from the top, each from the left; lines whose heights overlap by half are of one row."""
    rows: list[list[Line]] = []
    for line in sorted(lines, key=lambda x: x.box[1] + x.box[3]):
        _, top, _, bottom = line.box
        row = rows[-1] if rows else []
        if row:
            shared = min(bottom, row[-1].box[3]) - max(top, row[-1].box[1])
            if 2 * shared > min(bottom - top, row[-1].box[3] - row[-1].box[1]):
                row.append(line)
                continue
        rows.append([line])
    return [line for row in rows for line in sorted(row, key=lambda x: x.box[0])]
