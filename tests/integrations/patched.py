"""What tests of ``apply`` ask of a function."""

from __future__ import annotations


def fused(function):
    """Whether it is ours that runs."""
    found = getattr(function, "__guard_ops__", None)
    return found is not None and found.active
