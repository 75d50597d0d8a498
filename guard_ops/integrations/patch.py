"""Putting functions under other people's names, and taking them away again."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import Any


@dataclass(frozen=True)
class Target:
    """A function of a framework, or a method of one of its classes."""

    modules: tuple[str, ...]  # where it may be defined; those that can be imported are patched
    name: str  # "function" or "Class.method"
    replacement: Callable[..., Any]


@dataclass
class Patch:
    """What was replaced; :meth:`undo` puts it back. Also a context manager."""

    framework: str
    replaced: tuple[str, ...] = ()  # every place, as "module.name"
    _places: list[tuple[Any, str, Any]] = field(default_factory=list, repr=False)
    _on_undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Restore every original; repeating it is harmless."""
        for owner, name, original in reversed(self._places):
            setattr(owner, name, original)
        for call in self._on_undo:
            call()
        self._places.clear()
        self._on_undo.clear()

    @property
    def active(self) -> bool:
        """Whether the replacements are in place."""
        return bool(self._places or self._on_undo)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        return f"guard_ops in {self.framework}: {', '.join(self.replaced) or 'nothing replaced'}"


def replace(framework: str, targets: Sequence[Target]) -> Patch:
    """Replace every target, once the signatures of all have been checked.

    A module that imported a function by name holds its own reference; those are replaced too.

    Raises:
        ImportError: none of a target's modules can be imported.
        ValueError: a function does not look as expected; nothing is replaced then.
    """
    found: list[tuple[Target, str, Any, Any]] = []
    for target in targets:
        modules = _modules(framework, target)
        for module in modules:
            owner, name = _owner(module, target.name)
            original = vars(owner).get(name) if owner is not None else None
            if original is None:
                raise ValueError(
                    f"{module.__name__} has no {target.name}; this version of {framework} is not "
                    "one that guard_ops knows"
                )
            _check_signature(f"{module.__name__}.{target.name}", original, target.replacement)
            found.append((target, f"{module.__name__}.{target.name}", owner, original))
    patch = Patch(framework)
    replaced = []
    for target, label, owner, original in found:
        name = target.name.rsplit(".", 1)[-1]
        places = [(label, owner)]
        if "." not in target.name:
            places += [
                (f"{key}.{name}", module)
                for key, module in list(sys.modules.items())
                if module is not owner
                and isinstance(module, ModuleType)
                and vars(module).get(name) is original
            ]
        for where, place in places:
            if where in replaced:  # two scripts may share one function
                continue
            patch._places.append((place, name, original))
            setattr(place, name, target.replacement)
            replaced.append(where)
    patch.replaced = tuple(replaced)
    return patch


def _modules(framework: str, target: Target) -> list[ModuleType]:
    loaded, errors = [], []
    for name in target.modules:
        if name == "__main__":
            main = sys.modules["__main__"]
            if hasattr(main, target.name.split(".")[0]):
                loaded.append(main)
            continue
        try:
            loaded.append(importlib.import_module(name))
        except ImportError as error:
            errors.append(f"{name}: {error}")
    if not loaded:
        raise ImportError(f"{framework} cannot be imported here ({'; '.join(errors)})")
    return loaded


def _owner(module: ModuleType, name: str) -> tuple[Any, str]:
    owner: Any = module
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part, None)
    return owner, last


def _check_signature(label: str, original: Any, replacement: Callable[..., Any]) -> None:
    """Raises unless the parameters are alike: their names, order and kinds, and which are optional.

    An earlier version may lack the last optional ones, as its calls mean the same to ours.
    """
    expected, got = _parameters(replacement), _parameters(original)
    more = expected[len(got) :]
    if got != expected[: len(got)] or not all(name.endswith("=") for name in more):
        raise ValueError(
            f"{label} takes ({', '.join(got)}) but guard_ops replaces a version that takes "
            f"({', '.join(expected)}); nothing was replaced"
        )


def _parameters(function: Callable[..., Any]) -> list[str]:
    out = []
    for parameter in inspect.signature(function).parameters.values():
        optional = parameter.default is not inspect.Parameter.empty
        star = "*" if parameter.kind is inspect.Parameter.KEYWORD_ONLY else ""
        out.append(f"{star}{parameter.name}{'=' if optional else ''}")
    return out
