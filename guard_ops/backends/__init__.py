"""Which backend runs an op: the fastest one that its tensors' device has, or the one asked for.

A backend is a module with ``NAME``, ``FUSED``, ``supports(device)`` and the functions of
``reference.py`` in the same order of arguments; a fused one adds ``guard_loss`` and ``scaled``, and
``MAX_BATCH`` if the number of samples that its ``guard_loss`` takes is limited.
"""

from __future__ import annotations

import importlib
import os
import warnings
from contextvars import ContextVar
from types import ModuleType, TracebackType

import torch

from .. import callers, extension

# The fastest backend comes first; a device gets the first one that supports it.
ORDER = ("cuda", "triton", "cpu", "reference")

_loaded: dict[str, ModuleType] = {}
# What select() found, by the backend that was asked for.
_chosen: dict[tuple[str | None, torch.device], ModuleType] = {}
_unavailable: dict[str, str] = {}
_warned: set[str] = set()
_latest: str | None = None  # the latest name that was forced anywhere


def _load() -> None:
    for name in ORDER:
        try:
            _loaded[name] = importlib.import_module(f".{name}", __name__)
        except Exception as error:  # importing Triton, or what is left of it, may raise anything
            ours = isinstance(error, ImportError | OSError)
            _unavailable[name] = str(error) if ours else f"{type(error).__name__}: {error}"


def available_backends() -> tuple[str, ...]:
    """Names of the backends that this installation can run, the preferred ones first."""
    return tuple(name for name in ORDER if name in _loaded)


def unavailable_backends() -> dict[str, str]:
    """The backends that this installation lacks, and why: name -> reason."""
    return dict(_unavailable)


def asked_for() -> str | None:
    """The backend that the environment names.

    It is not checked at import, because the doctor has to start where the name is wrong.
    """
    return os.environ.get("GUARD_OPS_BACKEND", "").strip().lower() or None


def why_not(name: str) -> str:
    """Why there is no backend of that name here, and which there are."""
    reason = _unavailable.get(name, "there is no such backend")
    return f"{reason}; available: {', '.join(available_backends())}"


class use_backend:
    """Run every op on one backend, from now on or for a ``with`` block.

    It holds for the thread that calls it, and in asyncio for the task: it is a context variable
    (``contextvars``), so that two threads' blocks do not end each other's. What torch.compile has
    compiled is shared by all threads, and takes the choice that was made latest in any of them.

    Args:
        name: one of :func:`available_backends`, or None to choose by device again. The environment
            variable ``GUARD_OPS_BACKEND`` sets it for all threads at import, in any case of
            letters. A name that it cannot have is refused by the first call of an op.

    Raises:
        ValueError: this installation lacks the backend; the message says why.
    """

    def __init__(self, name: str | None) -> None:
        if name is not None and (not isinstance(name, str) or name not in _loaded):
            raise ValueError(f"`name` is {name!r}: {why_not(str(name))}")
        self._previous = _forced.get()
        _force(name)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _force(self._previous)


def _force(name: str | None) -> None:
    global _latest
    _latest = name
    _forced.set(name)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _forced_while_tracing(latest: str | None) -> str | None:
    """A context variable cannot be traced, so its value is a constant of what is compiled.

    ``latest`` is a plain variable, whose value torch.compile checks before it runs what it has
    compiled; so a thread that changes its choice gets what is compiled for that.
    """
    return _forced.get()


def select(device: torch.device) -> ModuleType:
    """The backend module for tensors on ``device``."""
    if torch.compiler.is_compiling():
        return _find(_forced_while_tracing(_latest), device)
    forced = _forced.get()
    found = _chosen.get((forced, device))
    if found is None:
        found = _chosen[forced, device] = _find(forced, device)
    return found


def _find(forced: str | None, device: torch.device) -> ModuleType:
    if forced is not None:
        if forced not in _loaded:  # only the environment may name one that is not there
            raise ValueError(f"GUARD_OPS_BACKEND is {forced!r}: {why_not(forced)}")
        module = _loaded[forced]
        if not module.supports(device):
            raise ValueError(f"backend {forced!r} does not run on {device}; use_backend(None)")
        return module
    for name in ORDER:
        module_or_none = _loaded.get(name)
        if module_or_none is not None and module_or_none.supports(device):
            break
    if name == "reference" and not torch.compiler.is_compiling():
        _warn_slow(device)
    return _loaded[name]


def max_batch(backend: ModuleType) -> float:
    """How many samples a fused backend's ``guard_loss`` takes.

    The loss of a larger batch is composed of the backend's ``sums`` and ``gradient``.
    """
    limit: float = getattr(backend, "MAX_BATCH", float("inf"))
    return limit


def _warn_slow(device: torch.device) -> None:
    if device.type in _warned or extension.warned():
        return
    _warned.add(device.type)
    why = "; ".join(f"{name}: {reason}" for name, reason in _unavailable.items())
    warnings.warn(
        f"guard_ops: no fused backend for {device.type} tensors, using the plain PyTorch "
        f"reference{f' ({why})' if why else ''}",
        RuntimeWarning,
        stacklevel=callers.outside(),
    )


_load()
_for_all_threads = asked_for()
_forced: ContextVar[str | None] = ContextVar("guard_ops_backend", default=_for_all_threads)
