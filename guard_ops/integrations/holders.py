"""Who holds a function: namespaces and classes, where it can be replaced, and everybody else."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator, Sequence
from types import BuiltinMethodType, CellType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

_PACKAGE = __name__.partition(".")[0]


class Place(NamedTuple):
    """A name under which something can be put."""

    owner: Any  # a namespace (dict), or a class
    name: str
    label: str  # "package.module.name"
    static: bool = False  # whether it is there as a staticmethod

    def get(self) -> Any:
        """What is there, as it was put there or in a base of the class; None if nothing is."""
        spaces = [self.owner] if isinstance(self.owner, dict) else map(vars, self.owner.__mro__)
        found = next((held[self.name] for held in spaces if self.name in held), None)
        return _of_static(found) if self.static else found

    def put(self, value: Any) -> None:
        """Replace what is there; a class that would inherit ``value`` has none of its own then."""
        if self.static:
            value = staticmethod(value)
        if isinstance(self.owner, dict):
            self.owner[self.name] = value
            return
        above = (vars(base) for base in self.owner.__mro__[1:])
        if next((held[self.name] for held in above if self.name in held), None) is not value:
            setattr(self.owner, self.name, value)
        elif self.name in vars(self.owner):
            delattr(self.owner, self.name)


def modules() -> dict[str, ModuleType]:
    """The imported modules, those of this package left out."""
    return {
        name: module
        for name, module in list(sys.modules.items())
        if isinstance(module, ModuleType) and name.partition(".")[0] != _PACKAGE
    }


def places(function: Any, holders: Sequence[Any]) -> list[Place]:
    """Every namespace and class of ``holders`` that has ``function``, under whatever name.

    A namespace is a module's, or that of a script which ``runpy`` or ``exec`` runs.
    """
    spaces = {id(vars(module)): name for name, module in reversed(modules().items())}
    found = []
    for holder in holders:
        if isinstance(holder, type):
            label, names = f"{holder.__module__}.{holder.__qualname__}", dict(vars(holder))
        elif id(holder) in spaces or _runs(holder):
            label, names = spaces.get(id(holder), str(holder.get("__name__"))), dict(holder)
        else:
            continue
        found += [
            Place(holder, name, f"{label}.{name}", value is not function)
            for name, value in names.items()
            if _of_static(value) is function and isinstance(name, str)
        ]
    return found


def holders_of(functions: Sequence[Any]) -> list[Any]:
    """What refers to any of ``functions``, or to a staticmethod of one; a class for its dict."""
    found = gc.get_referrers(*functions)
    statics = [holder for holder in found if type(holder) is staticmethod]
    if statics:
        known = {id(each) for each in (*found, found, statics)}
        found += [each for each in gc.get_referrers(*statics) if id(each) not in known]
    ours = {
        id(vars(module)) for module in list(sys.modules.values()) if hasattr(module, "__dict__")
    }
    loose = [d for d in found if isinstance(d, dict) and id(d) not in ours and "__module__" in d]
    classes = {}
    for owner in gc.get_referrers(*loose) if loose else ():
        if isinstance(owner, type):
            for space in loose:
                if all(vars(owner).get(name) is value for name, value in space.items()):
                    classes[id(space)] = owner
    return [classes.get(id(holder), holder) for holder in found if holder is not functions]


def unreachable(function: Any, holders: Sequence[Any], known: Sequence[Any]) -> list[str]:
    """Where ``function`` is held but cannot be replaced, in words; ``known`` are our own."""
    ours = {id(each) for each in known}
    spaces = {
        id(vars(module)) for module in list(sys.modules.values()) if hasattr(module, "__dict__")
    }
    replaced = {
        id((p.owner if isinstance(p.owner, dict) else vars(p.owner))[p.name])
        for p in places(function, holders)
        if p.static
    }
    words = []
    for holder in holders:
        if id(holder) in replaced:
            continue
        if id(holder) in ours or id(holder) in spaces or isinstance(holder, type) or _runs(holder):
            continue
        if any(each is function for each in gc.get_referents(holder)):
            word = _word(holder)
            if word is not None:
                words.append(f"{function.__name__} held by {word}: it cannot be replaced there")
    return list(dict.fromkeys(words))


def reaches(function: Any, wanted: Any, depth: int = 4) -> bool:
    """Whether calling ``function`` can call ``wanted``, as a wrapper or a partial can."""
    if function is wanted:
        return True
    return depth > 0 and any(
        reaches(inner, wanted, depth - 1) for inner in _called(function) if callable(inner)
    )


def _called(function: Any) -> Iterator[Any]:
    if isinstance(function, functools.partial):
        yield function.func
    if isinstance(function, MethodType):
        yield function.__func__
    if isinstance(function, FunctionType):
        yield vars(function).get("__wrapped__")
        for cell in function.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not filled yet
                continue
        for name in function.__code__.co_names:
            yield function.__globals__.get(name)


def _of_static(value: Any) -> Any:
    """The function of a staticmethod, by its type: a lazy stand-in is not asked for its class."""
    return value.__func__ if type(value) is staticmethod else value


def _runs(holder: Any) -> bool:
    """Whether it is the namespace of code that runs outside ``sys.modules``."""
    return isinstance(holder, dict) and "__builtins__" in holder


def _word(holder: Any) -> str | None:
    """What a holder is to whoever wrote it; None for what only the interpreter knows."""
    if isinstance(holder, MethodType | BuiltinMethodType):
        return "a bound method"
    if isinstance(holder, functools.partial):
        return "a functools.partial"
    if isinstance(holder, staticmethod | classmethod | property):
        return f"a {type(holder).__name__}"
    if isinstance(holder, FunctionType):
        return f"the function {holder.__qualname__}"
    if isinstance(holder, list | tuple | set | frozenset | dict):
        return f"a {type(holder).__name__}"
    if isinstance(holder, CellType):
        tuples = [t for t in gc.get_referrers(holder) if isinstance(t, tuple)]
        around = [f for f in gc.get_referrers(*tuples) if isinstance(f, FunctionType)]
        return f"the closure of {around[0].__qualname__}" if tuples and around else None
    kind = type(holder)
    if kind.__name__ == "frame" or kind.__module__.partition(".")[0] in ("builtins", _PACKAGE):
        return None
    return f"an attribute of a {kind.__qualname__}"
