"""A recipe's name or file and ``key=value`` words become settings with types, or an error."""

from __future__ import annotations

import dataclasses
import difflib
import os
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..trainer.extras import require
from .config import DigitsRecipe, Recipe

SHIPPED = Path(__file__).parent
KINDS: dict[str, type[Recipe] | type[DigitsRecipe]] = {"pipeline": Recipe, "digits": DigitsRecipe}
PATHS = {"model", "prompts", "gold_prompts", "out", "encodings"}  # in which ~ is a home
_REMEDIES = {
    "model": "a folder in diffusers' format, or an id of the hub",
    "prompts": 'a .txt file with a prompt a line, a .jsonl file with a "prompt" a line, or one of '
    "geneval, pickscore, text_rendering, which come with the package",
}


def shipped() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def resolve(
    recipe: str, given: Sequence[str] = (), *, needed: bool = True
) -> Recipe | DigitsRecipe:
    """The settings: defaults, under the recipe's, under its objective's, under those given.

    Args:
        recipe: the name of a shipped recipe, or a YAML file of keys. ``objectives`` in it holds
            the keys that an objective sets, by its name; ``kind`` is "pipeline" or "digits".
        given: ``key=value`` words.
        needed: False leaves text that has to be given, and is not, empty.

    Raises:
        ValueError: no such recipe; a key that does not exist, with the nearest that does; a value
            of another type; a key that has to be given and is not.
    """
    omegaconf = require("omegaconf", "train")
    path = _find(recipe)
    keys = _load(path)
    kind = keys.pop("kind", "pipeline")
    if kind not in KINDS:
        raise ValueError(f"{path}: `kind` is {kind!r}; it needs one of {', '.join(KINDS)}")
    wanted = KINDS[kind]
    objectives = _objectives(path, keys.pop("objectives", {}), wanted)
    words = _words(given)
    settings = omegaconf.OmegaConf.structured(wanted)
    for where, layer in ((f"{path}: ", {"out": f"runs/{path.stem}"} | keys), ("", words)):
        _check_keys(where, layer, wanted)
        for key, value in layer.items():
            _no_interpolation(where, key, value)
    objective = words.get("objective", keys.get("objective", wanted.objective))
    for where, layer in (
        (f"{path}: ", {"out": f"runs/{path.stem}-{objective}"} | keys),
        (f"{path}: objectives.{objective}: ", objectives.get(objective, {})),
        ("", words),
    ):
        _check_keys(where, layer, wanted)
        for key, value in layer.items():
            _set(settings, wanted, where, key, value)
    missing = [
        key for key in wanted.__dataclass_fields__ if omegaconf.OmegaConf.is_missing(settings, key)
    ]
    for key in () if needed else missing:
        settings[key] = ""
    if missing and needed:
        needs = _REMEDIES.get(missing[0], "a value")
        raise ValueError(f"`{missing[0]}` is not given; it needs {needs}: {missing[0]}=...")
    for key in PATHS & set(wanted.__dataclass_fields__):
        if settings[key]:
            settings[key] = os.path.expanduser(settings[key])
    result: Recipe | DigitsRecipe = omegaconf.OmegaConf.to_object(settings)
    return result


def _objectives(path: Path, found: Any, wanted: type[Any]) -> dict[str, dict[str, Any]]:
    """The keys of each objective, of which all are checked, also those that are not chosen."""
    known = typing.get_args(typing.get_type_hints(wanted)["objective"])
    if not isinstance(found, Mapping):
        raise ValueError(
            f"{path}: `objectives` is {found!r}; it needs the keys of each objective, by its name"
        )
    for name, layer in found.items():
        if name not in known:
            raise ValueError(
                f"{path}: objectives: there is no objective `{name}`"
                f"{_did_you_mean(str(name), known)}; there are {', '.join(known)}"
            )
        where = f"{path}: objectives.{name}: "
        _check_keys(where, layer, wanted)
        if "objective" in layer:
            raise ValueError(f"{where}`objective` is what these keys are of; it cannot be set here")
        settings = require("omegaconf", "train").OmegaConf.structured(wanted)
        for key, value in layer.items():
            _set(settings, wanted, where, key, value)
    return dict(found)


def as_yaml(settings: Recipe | DigitsRecipe) -> str:
    """The settings as a recipe."""
    text: str = require("omegaconf", "train").OmegaConf.to_yaml(dataclasses.asdict(settings))
    kind = next(name for name, wanted in KINDS.items() if isinstance(settings, wanted))
    return f"kind: {kind}\n{text}"


def written_by_a_run(path: Path) -> bool:
    """Whether a recipe is in the form in which runs write theirs."""
    try:
        return path.read_text() == as_yaml(resolve(str(path)))
    except (OSError, ValueError):
        return False


def _find(recipe: str) -> Path:
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"there is no recipe {recipe}")
        return path
    if recipe in shipped():
        return SHIPPED / f"{recipe}.yaml"
    raise ValueError(
        f"there is no recipe {recipe!r}{_did_you_mean(recipe, shipped())}; there are "
        f"{', '.join(shipped())}, or a .yaml file of yours"
    )


def _load(path: Path) -> dict[str, Any]:
    omegaconf = require("omegaconf", "train")
    try:
        found = omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.load(path))
    except Exception as error:  # of YAML, OmegaConf and the disk
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; it needs keys and values")
    return {str(key): value for key, value in found.items()}


def _words(given: Sequence[str]) -> dict[str, Any]:
    omegaconf = require("omegaconf", "train").OmegaConf
    for word in given:
        key, equals, _ = word.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"{word!r} is no setting; it needs key=value")
    result: dict[str, Any] = {}
    for word in given:
        try:
            result |= omegaconf.to_container(omegaconf.from_dotlist([word]))
        except Exception as error:  # of YAML and OmegaConf
            raise ValueError(f"{word!r} is no setting; its value is no YAML: {error}") from error
    return result


def _check_keys(where: str, layer: Any, wanted: type[Any]) -> None:
    if not isinstance(layer, Mapping):
        raise ValueError(f"{where}it needs keys and values, and is {layer!r}")
    known = list(wanted.__dataclass_fields__)
    for key in layer:
        if key not in known:
            raise ValueError(
                f"{where}there is no key `{key}`{_did_you_mean(key, known)}; keys are "
                f"{', '.join(known)}"
            )


def _set(settings: Any, wanted: type[Any], where: str, key: str, value: Any) -> None:
    errors = require("omegaconf.errors", "train")
    _no_interpolation(where, key, value)
    hint = typing.get_type_hints(wanted)[key]
    if type(value) is int and hint in (float, typing.Optional[float]):  # noqa: UP045
        value = float(value)
    if hint == typing.Optional[list[float]] and isinstance(value, list):  # noqa: UP045
        value = [float(x) if type(x) is int else x for x in value]
    try:
        settings[key] = value
    except (errors.ValidationError, errors.UnsupportedValueType) as error:
        raise ValueError(f"{where}`{key}` is {value!r}; it needs {_in_words(hint)}") from error


def _no_interpolation(where: str, key: str, value: Any) -> None:
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and "${" in text:
            raise ValueError(
                f"{where}`{key}` is {value!r}; it needs a value, as `${{...}}` is not looked up"
            )


def _in_words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is typing.Union:
        return f"{_in_words(arguments[0])} or null"
    if origin is list:
        return f"a list of {_in_words(arguments[0]).removeprefix('a ')}s"
    return {int: "an int", float: "a number", bool: "true or false", str: "text"}[hint]


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), 1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
