"""Which functions of the imported modules are, or might be, those of a framework."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, NamedTuple

from . import holders
from .holders import Place
from .proof import Cases


@dataclass(frozen=True)
class Target:
    """A function of a framework, or a method of one of its classes."""

    modules: tuple[str, ...]  # where it may be defined; looked at if they are imported
    name: str  # "function" or "Class.method"
    replacement: Callable[..., Any]
    cases: Callable[[Any], Cases]  # of the module or class that has it
    leads: bool = False  # imported if need be; where it is not what ours replaces, nothing is
    inherited: bool = False  # a method that a base may have: the class gets one of its own


@dataclass(frozen=True)
class Framework:
    """What is known of a framework."""

    name: str
    targets: tuple[Target, ...]
    others: dict[str, str] = field(default_factory=dict)  # "module.name" -> why it is not replaced
    register: Callable[[], Any] | None = None
    unregister: Callable[[], Any] | None = None


class Candidate(NamedTuple):
    """A function that may be what one of ``targets`` replaces."""

    place: Place
    targets: tuple[Target, ...]
    owner: Any  # the module or class that has it
    required: bool  # whether it is an error if it is not

    @property
    def original(self) -> Any:
        """What is there now."""
        return self.place.get()

    @property
    def inherited(self) -> bool:
        """Whether the class has it from a base."""
        return isinstance(self.owner, type) and self.place.name not in vars(self.owner)


def candidates(framework: Framework, named: Sequence[str]) -> tuple[list[Candidate], list[str]]:
    """What to look at, and what there is besides, with the reason why it is left alone.

    Nothing is imported but the module of a target that leads, and ``named``.

    Raises:
        ImportError: one of these cannot be imported.
        ValueError: a leading module lacks its function, or a named one has none.
    """
    left = _import(framework, named)
    found: dict[str, Candidate] = {}
    for target in framework.targets:
        for module in target.modules:
            required = target.leads or module in named
            candidate = _at(module, target, required)
            if candidate is not None:
                found[candidate.place.label] = candidate
            elif module in sys.modules and required:
                raise ValueError(
                    f"{module} has no {target.name}; this version of {framework.name} is not one "
                    "that guard_ops knows"
                )
            elif module not in sys.modules and len(target.modules) == 1 and not target.leads:
                left.append(f"{module}.{target.name}: this module is not imported")
    for candidate in _namesakes(framework, (*named, "__main__")):
        found.setdefault(candidate.place.label, candidate)
    for name in named:
        if not any(label.startswith(f"{name}.") for label in found):
            wanted = ", ".join(dict.fromkeys(t.name for t in framework.targets))
            raise ValueError(f"`modules` names {name}, which has none of {wanted} of its own")
    left += [
        f"{label}: {why}"
        for label, why in framework.others.items()
        if label.rpartition(".")[0] in sys.modules
    ]
    return list(found.values()), left + _methods(framework, found)


def _import(framework: Framework, named: Sequence[str]) -> list[str]:
    """Import what leads and what is named; returns what can be done without."""
    left = []
    anything = any(module in sys.modules for t in framework.targets for module in t.modules)
    leading = [t.modules[0] for t in framework.targets if t.leads]
    for name in (*leading, *named):
        try:
            importlib.import_module(name)
        except Exception as error:  # a framework's module may raise anything
            why = f"{name}: {type(error).__name__}: {error}"
            if name in named or not anything:
                raise ImportError(f"{framework.name} cannot be imported here ({why})") from error
            left.append(f"{why} (at its import)")
    return left


def _at(module: str, target: Target, required: bool) -> Candidate | None:
    owner: Any = sys.modules.get(module)
    *path, name = target.name.split(".")
    for part in path:
        owner = getattr(owner, part, None)
    if owner is None or not (name in vars(owner) or (target.inherited and hasattr(owner, name))):
        return None
    place = Place(owner if path else vars(owner), name, f"{module}.{target.name}")
    return Candidate(place, (target,), owner, required)


def _namesakes(framework: Framework, required: Sequence[str]) -> list[Candidate]:
    """Functions of a target's name that any module defines: a copy, a variant, another model's."""
    found = []
    names = dict.fromkeys(t.name for t in framework.targets if "." not in t.name)
    for label, module in holders.modules().items():
        for name in names:
            value = vars(module).get(name)
            if isinstance(value, FunctionType) and value.__module__ == label:
                targets = tuple(t for t in framework.targets if t.name == name)
                place = Place(vars(module), name, f"{label}.{name}")
                found.append(Candidate(place, targets, module, label in required))
    return found


def _methods(framework: Framework, found: dict[str, Candidate]) -> list[str]:
    """Methods of a target's name in other classes of its package, subclasses included."""
    left = []
    bases = {b for c in found.values() if isinstance(c.owner, type) for b in c.owner.__mro__}
    for target in framework.targets:
        *path, name = target.name.split(".")
        folder = target.modules[0].rpartition(".")[0]
        for label, module in holders.modules().items() if path else ():
            if label != folder and not label.startswith(f"{folder}."):
                continue
            for each in list(vars(module).values()):
                if not isinstance(each, type) or each in bases:
                    continue
                if each.__module__ == label and name in vars(each):
                    where = f"{label}.{each.__qualname__}.{name}"
                    if where not in found and not where.endswith(f".{target.name}"):
                        left.append(f"{where}: a method that guard_ops does not know")
    return list(dict.fromkeys(left))
