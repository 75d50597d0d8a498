"""Finds the line that calls this package, for a warning to name instead of a line of its own."""

from __future__ import annotations

import sys

PACKAGE = __name__.partition(".")[0]


def outside() -> int:
    """The ``stacklevel`` of the nearest caller that is not of this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] != PACKAGE:
            break
        level, frame = level + 1, frame.f_back
    return level
