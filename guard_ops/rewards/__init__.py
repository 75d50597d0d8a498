"""Rewards: what is made of pixels and prompts, one reward a file."""

from __future__ import annotations

import importlib
import os
import sys

from ..trainer.policy import Reward
from .jpeg_size import jpeg_size

REWARDS: dict[str, Reward] = {"jpeg_size": jpeg_size}

__all__ = ["REWARDS", "jpeg_size", "load_reward"]


def load_reward(name: str) -> Reward:
    """The reward of this name: one that comes with the package, or "module:function" of yours.

    Raises:
        ValueError: there is none.
    """
    if name in REWARDS:
        return REWARDS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(
            f"`reward` is {name!r}; it needs one of {', '.join(REWARDS)}, or a function of yours "
            "as module:function"
        )
    here = os.getcwd()  # which an installed command does not import from
    if not {here, ""} & set(sys.path):
        sys.path.append(here)
    try:
        found: Reward = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"`reward` is {name!r}, which cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"`reward` is {name!r}, which is a {type(found).__name__}, no function")
    return found
