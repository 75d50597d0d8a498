"""What client and server of a remote reward send: JSON, with images as PNG in base64.

    {"prompts": ["a cat"], "metadata": [{}], "frames": null, "images": ["iVBORw0..."]}
    {"scores": [0.31], "parts": {"exact": [0.0]}}

``frames`` is null for images, and F for videos, of which all frames of the first come first. A
part's number is null where it is not of a sample. Nothing is ever unpickled.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..trainer.extras import require
from ..trainer.policy import Scores
from .frames import to_bytes

MOST_PIXELS = 2**26  # of a request's images together, which would be 768 MiB in float32


class WireError(ValueError):
    """What was sent is not what it should be; says where."""


class Asked(NamedTuple):
    pixels: Tensor  # float32 [B, 3, H, W] or [B, F, 3, H, W] in [0, 1]
    prompts: list[str]
    metadata: list[dict[str, Any]]


def write_request(
    pixels: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> bytes:
    """The body of a request; images are rounded to 8 bits."""
    frames = pixels.shape[1] if pixels.ndim == 5 else None
    images = to_bytes(pixels.flatten(0, 1) if frames else pixels)
    body = {
        "prompts": list(prompts),
        "metadata": [dict(row) for row in metadata],
        "frames": frames,
        "images": [_png(image) for image in images],
    }
    return json.dumps(body).encode()


def read_request(body: bytes) -> Asked:
    """What a request asks.

    Raises:
        WireError: it is not in this form, or its images are too large.
    """
    found = _object(body)
    prompts, metadata = found.get("prompts"), found.get("metadata")
    images, frames = found.get("images"), found.get("frames")
    if not isinstance(prompts, list) or not prompts or not all(isinstance(x, str) for x in prompts):
        raise WireError('"prompts" needs to be a list of texts')
    if not isinstance(metadata, list) or not all(isinstance(x, dict) for x in metadata):
        raise WireError('"metadata" needs to be a list of objects')
    if len(metadata) != len(prompts):
        raise WireError(f'"metadata" has {len(metadata)} entries for {len(prompts)} prompts')
    if frames is not None and (type(frames) is not int or frames < 1):
        raise WireError('"frames" needs to be null, or an integer >= 1')
    if not isinstance(images, list) or not all(isinstance(x, str) for x in images):
        raise WireError('"images" needs to be a list of PNG files in base64')
    if len(images) != len(prompts) * (frames or 1):
        raise WireError(
            f'"images" has {len(images)} entries; {len(prompts)} prompts with "frames" {frames} '
            f"need {len(prompts) * (frames or 1)}"
        )
    left, each = MOST_PIXELS, list[Tensor]()
    for n, text in enumerate(images):
        each.append(_image(n, text, left))
        left -= each[-1].numel() // 3
        if each[-1].shape != each[0].shape:
            raise WireError(f"images[{n}] is of another size than images[0]")
    pixels = torch.stack(each).permute(0, 3, 1, 2).float() / 255
    if frames is not None:
        pixels = pixels.unflatten(0, (len(prompts), frames))
    return Asked(pixels, prompts, metadata)


def write_scores(scores: Scores) -> bytes:
    """The body of an answer."""
    parts = {name: _numbers(x) for name, x in scores.parts.items()}
    return json.dumps({"scores": _numbers(scores.total), "parts": parts}).encode()


def read_scores(body: bytes, count: int) -> Scores:
    """What a server answered for ``count`` samples.

    Raises:
        WireError: it is not in this form.
    """
    found = _object(body)
    parts = found.get("parts", {})
    if not isinstance(parts, dict):
        raise WireError('"parts" needs to be an object')
    total = _tensor("scores", found.get("scores"), count)
    return Scores(total, {name: _tensor(f"parts.{name}", x, count) for name, x in parts.items()})


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError(f"it is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise WireError(f"it is a {type(found).__name__}; it needs to be an object")
    return found


def _png(image: Tensor) -> str:
    buffer = io.BytesIO()
    pillow = require("PIL.Image", "rewards")
    pillow.fromarray(image.numpy()).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def _image(n: int, text: str, most: int) -> Tensor:
    """uint8 [H, W, 3]; its size is looked at before its pixels are unpacked."""
    pillow = require("PIL.Image", "rewards")
    try:
        data = base64.b64decode(text, validate=True)
        with pillow.open(io.BytesIO(data), formats=("PNG",)) as image:
            width, height = image.size
            if width * height > most:
                raise WireError(
                    f"images[{n}] is {width} x {height}; a request may have {MOST_PIXELS} pixels"
                )
            pixels = bytearray(image.convert("RGB").tobytes())
    except WireError:
        raise
    except (binascii.Error, OSError, SyntaxError, ValueError, EOFError) as error:
        raise WireError(f"images[{n}] is no PNG file in base64: {error}") from error
    except Exception as error:  # Pillow's own, such as a bomb's
        raise WireError(f"images[{n}] cannot be read: {error}") from error
    return torch.frombuffer(pixels, dtype=torch.uint8).reshape(height, width, 3)


def _numbers(values: Tensor) -> list[float | None]:
    return [x if math.isfinite(x) else None for x in values.double().tolist()]


def _tensor(name: str, values: Any, count: int) -> Tensor:
    if not isinstance(values, list) or len(values) != count:
        raise WireError(f'"{name}" needs to be a list of {count} numbers')
    if not all(x is None or type(x) in (int, float) for x in values):
        raise WireError(f'"{name}" has something else than numbers')
    try:
        return torch.tensor([math.nan if x is None else float(x) for x in values])
    except OverflowError as error:
        raise WireError(f'"{name}" has a number that is too large') from error
