"""Putting functions under other people's names, and taking them away again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FunctionType, TracebackType
from typing import Any

from . import holders
from .discovery import Candidate, Framework, Target, candidates
from .holders import Place
from .proof import DisprovedError, Proof, prove


@dataclass(eq=False)
class StandIn:
    """What stands under the original's name, and what it calls."""

    original: Callable[..., Any]
    function: Callable[..., Any]
    label: str
    proof: Proof
    active: bool = False
    places: list[Place] = field(default_factory=list)
    only: Place | None = None  # where the original is inherited: nobody else's is replaced

    @property
    def in_place(self) -> bool:
        """Whether the name under which it was found still leads to ours."""
        own = [p for p in self.places if p.label == self.label] or self.places
        return self.active and any(holders.reaches(p.get(), self.function) for p in own)


class Installation:
    """The functions of one framework that are replaced now; its patches share it."""

    def __init__(self, framework: Framework) -> None:
        self.framework = framework
        self.stand_ins: list[StandIn] = []
        self.handles = 0

    def scan(self, named: Sequence[str]) -> tuple[str, ...]:
        """Replace what can be found and proved now; returns what was left alone, and why.

        Raises:
            ImportError: a module that has to be imported cannot be, or none has a function.
            ValueError: a function of a leading or named module, or of the running script, is not
                what ours replaces; nothing is replaced then.
        """
        found, left = candidates(self.framework, named)
        new: list[StandIn] = []
        for candidate in found:
            current = candidate.original
            wrapped = [s for s in self.stand_ins if holders.reaches(current, s.function)]
            if wrapped and all(current is not s.function for s in wrapped):
                left.append(f"{candidate.place.label}: a wrapper of ours; it goes on calling ours")
            if wrapped or any(_covers(s, candidate) for s in (*self.stand_ins, *new)):
                continue
            try:
                new.append(_proved(candidate))
            except DisprovedError as error:
                reason = f"{candidate.place.label} is not what guard_ops replaces: {error}"
                if candidate.required:
                    raise ValueError(f"{reason}; nothing was replaced") from error
                left.append(reason)
        if not new and not self.stand_ins:
            raise ImportError(self._nothing_found(left))
        self.stand_ins += new
        return (*left, *self._put())

    def _put(self) -> list[str]:
        """Replace the originals wherever they are held; returns where that cannot be done."""
        left, ours = [], []
        holding = holders.holders_of([each.original for each in self.stand_ins])
        for each in self.stand_ins:
            function: Any = each.function
            ours += [each, vars(each), vars(function), *function.__closure__]
        for each in self.stand_ins:
            each.active = True
            if each.only is not None:
                found = [each.only] if each.only.get() is each.original else []
            else:
                left += holders.unreachable(each.original, holding, ours)
                found = holders.places(each.original, holding)
            for place in found:
                place.put(each.function)
            before = [p for p in each.places if holders.reaches(p.get(), each.function)]
            each.places = list({(id(p.owner), p.name): p for p in (*before, *found)}.values())
        return left

    def _nothing_found(self, left: list[str]) -> str:
        names = ", ".join(dict.fromkeys(t.name for t in self.framework.targets))
        reasons = f" ({'; '.join(left)})" if left else ""
        return (
            f"{self.framework.name} has nothing to replace here: no imported module has one of "
            f"{names} as guard_ops knows it{reasons}; call apply after the module's import (in a "
            "script: after the function's definition), or name the module in `modules`"
        )

    def remove(self) -> tuple[str, ...]:
        """Put every original back wherever ours is; returns where something else is by now."""
        kept = []
        holding = holders.holders_of([each.function for each in self.stand_ins])
        for each in reversed(self.stand_ins):
            each.active = False
            kept += [p.label for p in each.places if p.get() is not each.function]
            for place in holders.places(each.function, holding):
                place.put(_unwrapped(each.original))
        self.stand_ins.clear()
        return tuple(kept)


class Patch:
    """What was replaced, on what proof, and what was not; print it.

    :meth:`undo` takes this patch back, also at the end of a ``with``. The functions are the
    originals again once every patch of the framework has been undone.
    """

    def __init__(self, installation: Installation, modules: Sequence[str] = ()) -> None:
        self._installation = installation
        self.framework = installation.framework.name
        self.replaced: tuple[str, ...] = ()  # every place, as "module.name"
        self.proofs: dict[str, Proof] = {}  # of every function that was replaced, by its own name
        self.left_alone: tuple[str, ...] = ()  # "module.name: why"
        self._live = False
        self.rescan(modules)
        self._live = True
        installation.handles += 1

    def rescan(self, modules: Sequence[str] = ()) -> Patch:
        """Look again, after imports or a reload; what is replaced already stays as it is.

        Args:
            modules: to be imported first, if they are not, and looked at.

        Raises:
            ImportError, ValueError: as :func:`guard_ops.integrations.apply`.
        """
        self.left_alone = self._installation.scan(modules)
        stand_ins = self._installation.stand_ins
        self.replaced = tuple(dict.fromkeys(p.label for each in stand_ins for p in each.places))
        self.proofs = {each.label: each.proof for each in stand_ins}
        return self

    def undo(self) -> None:
        """Take this patch back; repeating it is harmless.

        A wrapper that was put around our function stays, and calls the original from now on.
        """
        if not self._live:
            return
        self._live = False
        installation = self._installation
        installation.handles -= 1
        if installation.handles == 0:
            kept = installation.remove()
            self.left_alone = tuple(f"{label}: was changed after apply, and kept" for label in kept)
            if installation.framework.unregister is not None:
                installation.framework.unregister()

    @property
    def active(self) -> bool:
        """Whether this patch is in effect: the names that were replaced still lead to ours.

        A reload puts the original back under its name; :meth:`rescan` replaces it again.
        """
        stand_ins = self._installation.stand_ins  # several of one label after a reload
        names = {each.label for each in stand_ins}
        return self._live and names == {each.label for each in stand_ins if each.in_place}

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
        lines = [f"guard_ops in {self.framework}{'' if self._live else ', undone'}"]
        lines += [f"  replaced {label}" for label in self.replaced]
        lines += [f"  proved {label}: {proof}" for label, proof in self.proofs.items()]
        return "\n".join([*lines, *(f"  left alone {each}" for each in self.left_alone)])


def _unwrapped(function: Any) -> Any:
    """The original of an original that is itself a stand-in which was taken back."""
    while getattr(function, "__guard_ops__", None) is not None:
        if function.__guard_ops__.active:
            break
        function = function.__guard_ops__.original
    return function


def _covers(stand_in: StandIn, candidate: Candidate) -> bool:
    """Whether the stand-in is for what the candidate is now."""
    if stand_in.original is not candidate.original:
        return False
    return stand_in.only == (candidate.place if candidate.inherited else None)


def _proved(candidate: Candidate) -> StandIn:
    """A stand-in for the first target that the function is proved to be; it is not in place yet.

    Raises:
        DisprovedError: it is none of them; the message is that of the first.
    """
    errors = []
    for target in candidate.targets:
        try:
            return _stand_in(candidate, target)
        except DisprovedError as error:
            errors.append(error)
    raise errors[0]


def _stand_in(candidate: Candidate, target: Target) -> StandIn:
    original = candidate.original
    if not isinstance(original, FunctionType):
        raise DisprovedError(f"it is a {type(original).__name__} and not a function")
    call = _adapted(original, target.replacement)
    proof = prove(original, call, functools.partial(target.cases, candidate.owner))
    stand_in = StandIn(original, original, candidate.place.label, proof)
    proved: Any = None  # the class, where the method calls others that a subclass may override
    if candidate.inherited:
        stand_in.only, proved = candidate.place, candidate.owner

    @functools.wraps(original)
    def fused(*args: Any, **kwargs: Any) -> Any:
        ours = stand_in.active and (proved is None or type(args[0]) is proved)
        return (call if ours else original)(*args, **kwargs)

    fused.__guard_ops__ = stand_in  # type: ignore[attr-defined]
    stand_in.function = fused
    return stand_in


def _adapted(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    """``replacement``, called with the original's order of parameters and its defaults.

    Raises:
        DisprovedError: a parameter is unknown, or one is missing that ours cannot do without.
    """
    theirs, ours = (inspect.signature(f).parameters for f in (original, replacement))
    unknown = [name for name in theirs if name not in ours]
    missing = [n for n, p in ours.items() if p.default is p.empty and n not in theirs]
    if unknown or missing:
        what = f"takes `{unknown[0]}`" if unknown else f"does not take `{missing[0]}`"
        raise DisprovedError(f"it {what}; guard_ops replaces a function of ({', '.join(ours)})")
    defaults = {
        name: p.default
        for name, p in theirs.items()
        if p.default is not p.empty and not _alike(p.default, ours[name].default)
    }
    names = [n for n, p in theirs.items() if p.kind is not p.KEYWORD_ONLY]
    if not defaults and names == list(ours)[: len(names)]:
        return replacement
    signature = inspect.signature(original)

    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments  # raises as the original does
        return replacement(**{**defaults, **given})

    return call


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return list(one) == list(other)
    return one is other or (type(one) is type(other) and bool(one == other))
