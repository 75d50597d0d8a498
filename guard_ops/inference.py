"""What outlives torch.inference_mode(), in which rollout engines sample.

Autograd refuses to keep a tensor that was made there. What a caller keeps is therefore made outside
of it (:func:`lasting`), and what a rollout made there is taken as a constant
(``transitions.normal``, ``autograd._save``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def lasting(function: F) -> F:
    """``function`` outside of inference mode: for schedules, coefficients, seeds, statistics."""

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return outside  # type: ignore[return-value]
