"""``name.key=value`` words become the arguments of rewards, or an error that names the nearest."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any


def by_reward(names: Sequence[str], words: Sequence[str]) -> dict[str, dict[str, str]]:
    """The options of each reward, as text.

    Raises:
        ValueError: a word is no option, or of no reward that is used.
    """
    found: dict[str, dict[str, str]] = {name: {} for name in names}
    for word in words:
        left, equals, value = word.partition("=")
        name, dot, key = left.rpartition(".")
        if not (equals and dot and name and key):
            raise ValueError(f"`reward_options` has {word!r}; it needs name.key=value")
        if name not in found:
            raise ValueError(f"`reward_options` has {word!r}, but `reward` is {'+'.join(names)}")
        found[name][key] = value
    return found


def arguments(name: str, kind: Callable[..., Any], options: dict[str, str]) -> dict[str, Any]:
    """The arguments of a reward's class, of the types of their defaults.

    Raises:
        ValueError: it has no such argument, or the value is of another type.
    """
    known = {
        key: parameter.default
        for key, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }
    result: dict[str, Any] = {}
    for key, text in options.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
            raise ValueError(
                f"`reward_options` has {name}.{key}"
                f"{f'; did you mean {name}.{near[0]}?' if near else ''}; {name} has "
                f"{', '.join(known)}"
            )
        wanted = type(known[key])
        try:
            result[key] = wanted(text)
        except ValueError as error:
            raise ValueError(
                f"`reward_options` has {name}.{key}={text}; it needs {wanted.__name__}"
            ) from error
    return result
