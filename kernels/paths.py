"""Chooses a path of the fused loss by sizes and objective, as docs/gpu.md documents.

``GUARD_OPS_TRITON_PATH=two_launches|one_launch|rows`` overrides it, for benchmarks and tests.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch

from .transition import TILE

MAX_SEGMENTS = 128  # in a row
PATHS = ("two_launches", "one_launch", "rows")


class Machine(NamedTuple):
    """What the choice of a path depends on in a device."""

    processors: int  # each runs one program of grid_kernel
    cache_bytes: int  # size of the second-level cache
    cooperative: bool  # whether a launch can promise that all its programs are resident


_apart: set[torch.device] = set()  # the devices that have refused a cooperative launch


def machine(device: torch.device) -> Machine:
    """What is known of ``device``; Triton's interpreter counts as a single processor."""
    known = _machine(device)
    return known._replace(cooperative=False) if device in _apart else known


def refused(device: torch.device, error: RuntimeError) -> bool:
    """Whether a launch failed because it was cooperative; then the device gets no more of them.

    A partition of a GPU may run fewer programs at once than the GPU has processors.
    """
    if "cooperative launch" not in str(error):
        return False
    _apart.add(device)
    return True


@functools.cache
def _machine(device: torch.device) -> Machine:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        cache = getattr(properties, "L2_cache_size", 0)
        return Machine(properties.multi_processor_count, cache, torch.version.hip is None)
    if device.type == "xpu":
        xpu = torch.xpu.get_device_properties(device)
        return Machine(getattr(xpu, "gpu_eu_count", 8) // 8 or 1, 0, False)
    return Machine(1, 0, False)


class Cut(NamedTuple):
    """How a call is cut into programs. Its shape alone decides that, so it decides the bits too."""

    rows: int  # K B
    tiles: int  # in a segment
    segments: int  # in a row
    row_tiles: int  # in a row

    @property
    def units(self) -> int:
        return self.rows * self.segments

    @property
    def padded(self) -> int:
        """The smallest power of two that is not below ``segments``."""
        return 1 << (self.segments - 1).bit_length()

    @property
    def one_tile(self) -> bool:
        """Whether a row is one tile."""
        return self.row_tiles == 1


def segment_tiles(numel: int) -> int:
    """Tiles in a segment: the smallest power of two by which a row has at most MAX_SEGMENTS."""
    tiles = -(-numel // int(TILE.value))
    return 1 << (-(-tiles // MAX_SEGMENTS) - 1).bit_length()


def cut(steps: int, batch: int, numel: int) -> Cut:
    """Cuts a call of K x B latents of ``numel`` elements."""
    tiles = segment_tiles(numel)
    row_tiles = -(-numel // int(TILE.value))
    return Cut(steps * batch, tiles, -(-row_tiles // tiles), row_tiles)


def choose(on: Machine, parts: Cut, row_bytes: int, independent: bool) -> str:
    """The path of a call.

    - ``one_launch`` where every segment is one tile and has its own processor: nothing is read
      twice and one launch is saved. That is up to 540,672 elements on an H100.
    - ``rows`` where a transition needs only its own sums (``independent``), there are enough of
      them to fill the device, and a transition is one tile, or the second-level cache, from which
      it is read again, holds two per processor.
    - ``two_launches`` otherwise.
    """
    forced = os.environ.get("GUARD_OPS_TRITON_PATH")
    if forced:
        if forced not in PATHS:
            raise ValueError(
                f"GUARD_OPS_TRITON_PATH is {forced!r}; it needs one of {', '.join(PATHS)}"
            )
        resident = on.cooperative or on.processors == 1  # a single program waits for no other
        possible = {"rows": independent, "one_launch": resident}.get(forced, True)
        return forced if possible else "two_launches"
    if on.cooperative and parts.tiles == 1 and parts.units <= on.processors:
        return "one_launch"
    fits = parts.one_tile or 2 * on.processors * row_bytes <= on.cache_bytes
    return "rows" if independent and parts.rows >= on.processors and fits else "two_launches"
