"""GenEval (arXiv:2310.11513): are the objects that a prompt asks for there, as many, where, how?

A prompt's metadata are the official ones:

    {"tag": "counting", "include": [{"class": "dog", "count": 2}],
     "exclude": [{"class": "dog", "count": 3}], "prompt": "a photo of two dogs"}

with ``"color": "red"`` or ``"position": ["left of", 0]`` (of the 0th object of ``include``) in an
entry of ``include``; tags are ``single_object``, ``two_object``, ``counting``, ``colors``,
``position`` and ``color_attr``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..trainer.policy import Scores
from .colours import COLOURS, Colours
from .detector import CLASSES, MODEL, Detection, Detections, Mask2Former
from .frames import frames_of

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # a detection's least score; the latter for counting
MOST = 16  # detections of a class that are looked at
_MARGIN = 0.1  # of both sizes, by which centres have to be apart

ColoursOf = Callable[[Sequence[Detection], str], list[str]]
"""The colours of detections, which are of a class."""


class Verdict(NamedTuple):
    """What an image is worth."""

    score: float  # of flow_grpo: the mean over what was asked for of the share that is there
    strict: bool  # as many as asked for, and all of them right
    correct: bool  # GenEval's own: at least as many as asked for, and nothing excluded


class GenEval:
    """The share of what a prompt asks for, in [0, 1]; a video's frames on average.

    Parts: ``strict`` and ``correct``, 0 or 1, and the correct ones of each task by its name.

    Args:
        model: a folder with a Mask2Former for COCO's instances, or an id of the hub.
        clip: a folder with the CLIP that tells colours, or an id of the hub.
        dtype: of both: "float32", "bfloat16" or "float16".
        detect: a function of images [B, 3, H, W] instead of ``model``; from Python only.

    Raises:
        ValueError: of a model that is not there, or another dtype.
    """

    name = "geneval"

    def __init__(
        self,
        model: str = MODEL,
        clip: str = "",
        dtype: str = "float32",
        *,
        detect: Callable[[Tensor], list[Detections]] | None = None,
    ) -> None:
        self._detect = Mask2Former(model, dtype) if detect is None else detect
        self._colours = Colours(clip, dtype) if clip else Colours(dtype=dtype)

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """Raises ValueError for a prompt whose metadata are not GenEval's; names the entry."""
        for prompt, row in zip(prompts, metadata, strict=True):
            check_metadata(prompt, row)

    def fetch(self) -> None:
        """Download what is not there; nothing is loaded."""
        self._colours.fetch()
        if isinstance(self._detect, Mask2Former):
            self._detect.fetch()

    def prepare(self, device: torch.device) -> None:
        """Load the models."""
        self._colours.prepare(device)
        if isinstance(self._detect, Mask2Former):
            self._detect.prepare(device)

    def __call__(
        self, pixels: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Scores:
        """[B], of pixels [B, 3, H, W] or [B, F, 3, H, W] in [0, 1].

        Raises:
            ValueError: a prompt's metadata are not GenEval's; names the entry.
        """
        self.check_prompts(prompts, metadata)
        frames = frames_of(pixels, prompts, metadata)
        asked = frames.of(metadata)
        verdicts = []
        for image, found, row in zip(
            frames.images, self._detect(frames.images), asked, strict=True
        ):

            def colours(
                objects: Sequence[Detection], kind: str, image: Tensor = image
            ) -> list[str]:
                return self._colours(image, objects, kind)

            verdicts.append(judge(kept(found, row["tag"]), row, colours))
        columns = torch.tensor([[float(x) for x in v] for v in verdicts], device=pixels.device)
        score, strict, correct = (frames.mean(x) for x in columns.unbind(1))
        parts = {"strict": strict, "correct": correct}
        for task in TASKS:
            own = torch.tensor([row["tag"] == task for row in metadata], device=pixels.device)
            parts[task] = torch.where(own, correct, torch.nan)
        return Scores(score, parts)


def kept(found: Detections, tag: str) -> Detections:
    """The detections that count: by class those above the threshold, the surest first."""
    least = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    result = {}
    for kind, objects in found.items():
        sure = sorted((x for x in objects if x.score > least), key=lambda x: -x.score)
        if sure:
            result[kind] = sure[:MOST]
    return result


def judge(found: Detections, asked: Mapping[str, Any], colours: ColoursOf) -> Verdict:
    """What an image with these detections is worth.

    GenEval's ``correct`` looks at the surest ones, as many as asked for; flow_grpo's score and
    ``strict`` at all, of which there must be exactly as many. Ours differs from flow_grpo's score
    in that a wrong position counts 0, where there it counts 0 and 1.
    """
    shares: list[float] = []
    strict = _all_right(found, asked, colours, exact=True, shares=shares)
    correct = _all_right(found, asked, colours, exact=False, shares=[])
    for entry in asked.get("exclude", []):
        correct &= len(found.get(entry["class"], [])) < entry["count"]
    return Verdict(sum(shares) / len(shares) if shares else 0.0, strict, correct)


def _all_right(
    found: Detections,
    asked: Mapping[str, Any],
    colours: ColoursOf,
    *,
    exact: bool,
    shares: list[float],
) -> bool:
    """Whether all of ``include`` is there; adds to ``shares`` how much of each requirement is."""
    right, groups = True, list[Sequence[Detection] | None]()
    for entry in asked.get("include", []):
        kind, count = entry["class"], entry["count"]
        objects = found.get(kind, [])
        shares.append(1 - abs(count - len(objects)) / count)
        if not exact:
            objects = objects[:count]
        matched = len(objects) == count
        if not matched and ("color" in entry or "position" in entry):
            shares.append(0.0)
        if matched and "color" in entry:
            of_colour = colours(objects, kind).count(entry["color"])
            shares.append(1 - abs(count - of_colour) / count)
            matched = of_colour == count
        if matched and "position" in entry:
            relation, place = entry["position"]
            target = groups[place]
            matched = target is not None and all(
                relation in relations(a.box, b.box) for a in objects for b in target
            )
            shares.append(float(matched))
        groups.append(objects if matched else None)
        right &= matched
    return right


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Where the box (left, top, right, bottom) ``a`` lies relative to ``b``.

    Centres count as apart by what exceeds a tenth of both sizes; a direction is one in which more
    than half of their distance lies.
    """
    offset, apart = [], []
    for low, high in ((0, 2), (1, 3)):
        distance = (a[low] + a[high] - b[low] - b[high]) / 2
        sizes = abs(a[high] - a[low]) + abs(b[high] - b[low])
        offset.append(distance)
        beyond = max(abs(distance) - _MARGIN * sizes, 0.0)
        apart.append(beyond if distance > 0 else -beyond)
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    if all(abs(x) < 1e-3 for x in apart):
        return set()
    dx, dy = (x / length for x in apart)
    directions = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
    return {name for name, true in zip(RELATIONS, directions, strict=True) if true}


def check_metadata(prompt: str, row: Mapping[str, Any]) -> None:
    """Raises ValueError if a prompt's metadata are not GenEval's."""
    where = f"GenEval's metadata of {prompt!r}"
    if row.get("tag") not in TASKS:
        raise ValueError(
            f'{where} have the "tag" {row.get("tag")!r}; it needs one of {", ".join(TASKS)} (a '
            ".jsonl file of prompts has them)"
        )
    if not row.get("include"):
        raise ValueError(f'{where} have no "include", a list of what the image is to have')
    for name in ("include", "exclude"):
        for place, entry in enumerate(row.get(name, [])):
            said = f"{where}: {name}[{place}]"
            if not isinstance(entry, Mapping) or entry.get("class") not in CLASSES:
                raise ValueError(f'{said} is {entry!r}; its "class" needs to be one of COCO\'s')
            count = entry.get("count")
            if type(count) is not int or count < 1:
                raise ValueError(f'{said} has the "count" {count!r}; it needs an int >= 1')
            if entry.get("color", "red") not in COLOURS:
                raise ValueError(
                    f'{said} has the "color" {entry["color"]!r}; it needs one of '
                    f"{', '.join(COLOURS)}"
                )
            _check_position(said, entry.get("position", ["above", 0]), max(place, 1))


def _check_position(said: str, position: Any, before: int) -> None:
    right = (
        isinstance(position, list | tuple)
        and len(position) == 2
        and position[0] in RELATIONS
        and type(position[1]) is int
        and 0 <= position[1] < before
    )
    if not right:
        raise ValueError(
            f'{said} has the "position" {position!r}; it needs one of {", ".join(RELATIONS)} and '
            'the number of an entry of "include" before it'
        )
