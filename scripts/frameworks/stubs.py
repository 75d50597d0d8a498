"""Importing a framework's real modules where what else they need is not installed.

A module that no other finder knows becomes a stand-in whose every attribute is a stand-in. What
was stood in for is recorded and printed, so that a reader can tell what a result rests on.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any


class Anything:
    """It has every attribute, can be called and subscripted, and as a base class it vanishes."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # used as a decorator it gives back what it decorates
        decorates = len(args) == 1 and not kwargs
        return args[0] if decorates and isinstance(args[0], types.FunctionType | type) else self

    def __getitem__(self, key: Any) -> Any:
        return self

    def __or__(self, other: Any) -> Any:
        return other

    __ror__ = __or__

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return ()

    def __instancecheck__(self, value: Any) -> bool:
        return False


class Stub(types.ModuleType):
    """A module that has everything."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last finder: what nobody has is a :class:`Stub`, except under ``packages``."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages
        self.made: list[str] = []

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] in (*self.packages, "guard_ops", "__main__"):
            return None
        if name.rpartition(".")[2][:1].isupper():  # a name that an installed module lacks
            return None
        if not _asked_by(self.packages):  # a library looks what is installed, and finds nothing
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        self.made.append(spec.name)
        stub = Stub(spec.name)
        stub.__path__ = []
        return stub

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def _asked_by(packages: tuple[str, ...]) -> bool:
    """Whether the import statement that runs now stands in a framework's file or in a stub's."""
    frame = sys._getframe(2)
    while frame is not None and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    name = frame.f_globals.get("__name__", "") if frame is not None else ""
    return name.partition(".")[0] in packages


def bare_package(name: str, folder: Path) -> None:
    """A package whose ``__init__`` is not run, because it imports every model there is."""
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, package)
