"""Rewards: what is made of pixels and prompts, one reward a file.

A reward is called with pixels [B, 3, H, W] (or [B, F, 3, H, W]) in [0, 1], B prompts and B mappings
of metadata; it returns [B], or :class:`~guard_ops.trainer.Scores` with named parts. It may have
``check_prompts(prompts, metadata)``, which raises for what it cannot judge, ``fetch()``, which
downloads what it needs, and ``prepare(device)``, which loads that.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from ..trainer.policy import Reward
from .combine import Combined
from .jpeg_size import jpeg_size
from .options import arguments, by_reward

_MADE = {  # by name, the module and the class; imported when one is asked for
    "aesthetic": ("aesthetic", "Aesthetic"),
    "clip_score": ("clip_score", "ClipScore"),
    "geneval": ("geneval", "GenEval"),
    "pickscore": ("pickscore", "PickScore"),
    "remote": ("remote", "Remote"),
    "text_rendering": ("text_rendering", "TextRendering"),
}
REWARDS: tuple[str, ...] = tuple(sorted([*_MADE, "jpeg_size"]))

__all__ = ["REWARDS", "Combined", "jpeg_size", "load_reward"]


def load_reward(
    name: str,
    options: Sequence[str] = (),
    weights: Sequence[float] | None = None,
    advantages: str = "summed",
) -> Reward:
    """The reward of this name, with nothing loaded or downloaded yet.

    Args:
        name: one that comes with the package, "module:function" of yours, or several with "+"
            between them.
        options: ``name.key=value`` words, arguments of the rewards that come with the package.
        weights: of several rewards; default: 1 each.
        advantages: of several rewards: "summed" or "separate" (GDPO), see
            :class:`~guard_ops.rewards.combine.Combined`.

    Raises:
        ValueError: there is no such reward, or option; a model that an option names is not there.
            ModuleNotFoundError: what a reward needs is not installed; names what to install.
    """
    names = [part.strip() for part in name.split("+")]
    if len(set(names)) < len(names):
        raise ValueError(f"`reward` is {name!r}, which has one reward twice; it has a weight for")
    given = by_reward(names, options)
    found = {each: _one(each, given[each]) for each in names}
    if len(found) > 1:
        return Combined(found, weights, advantages)
    if weights is not None:
        raise ValueError(f"`reward_weights` is {list(weights)}, for the one reward {name!r}")
    if advantages != "summed":
        raise ValueError(
            f"`reward_advantages` is {advantages!r}; the one reward {name!r} needs summed"
        )
    return found[name.strip()]


def _one(name: str, options: dict[str, str]) -> Reward:
    if name in _MADE:
        module, made = _MADE[name]
        kind: Callable[..., Reward] = getattr(importlib.import_module(f".{module}", __name__), made)
        return kind(**arguments(name, kind, options))
    if options:
        raise ValueError(
            f"`reward_options` has {name}.{next(iter(options))}, but {name} takes no options"
        )
    return jpeg_size if name == "jpeg_size" else _of_yours(name)


def _of_yours(name: str) -> Reward:
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(
            f"`reward` is {name!r}; it needs one of {', '.join(REWARDS)}, or a function of yours "
            "as module:function, or several with + between them"
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
