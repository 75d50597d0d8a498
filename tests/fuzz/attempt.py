"""A call that may be refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def attempt(call: Callable[[], T]) -> tuple[T, None] | tuple[None, Exception]:
    """What the call returned and None, or None and what it raised."""
    try:
        return call(), None
    except Exception as error:
        return None, error
