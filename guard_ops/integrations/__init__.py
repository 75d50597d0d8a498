"""Guard Ops inside the trainers people already run: one import, one line.

    import guard_ops.integrations
    print(guard_ops.integrations.apply("flow_grpo"))

See docs/swap-in.md for every framework's diff and for what differs from docs/math.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import (
    dance_grpo,
    flow_factory,
    flow_grpo,
    flow_grpo_bagel,
    flow_grpo_wan,
    unirl,
    verl_omni,
)
from .patch import Installation, Patch
from .targets import KNOWN

__all__ = [
    "FRAMEWORKS",
    "Patch",
    "apply",
    "dance_grpo",
    "flow_factory",
    "flow_grpo",
    "flow_grpo_bagel",
    "flow_grpo_wan",
    "unirl",
    "verl_omni",
]

FRAMEWORKS = tuple(KNOWN)

_installations: dict[str, Installation] = {}


def apply(framework: str, modules: Sequence[str] = ()) -> Patch:
    """Put the fused functions under a framework's own names, once they are proved to be equal.

    Before anything is replaced, the original and ours answer the same calls on small CPU tensors,
    over the options and defaults of the original's signature; every return value and gradient is
    compared. Then every namespace that holds the original gets ours, under whatever name. Applying
    again looks again, and counts: the originals are back when every patch has been undone.
    ``verl_omni`` also gets the losses ``flow_grpo_fused`` and ``grpo_guard_fused`` in its registry.

    Args:
        framework: one of ``FRAMEWORKS``: flow_grpo, dance_grpo, verl_omni, flow_factory,
            unirl.
        modules: more modules to import and look at. Otherwise only the one module is imported that
            has the framework's main step (DanceGRPO has none), and what is imported is looked at.

    Returns:
        Patch: ``print`` it to see what was replaced, on what proof, and what was left alone;
        ``.undo()`` it, ``.rescan()`` after later imports, or use it in a ``with``.

    Raises:
        ValueError: there is no such framework, or the function of the main module, of one in
            ``modules`` or of the running script does something else than ours: the message has
            the first difference, and nothing is replaced.
        ImportError: the framework or one of ``modules`` cannot be imported, or no module has a
            function to replace.
    """
    if framework not in KNOWN:
        raise ValueError(f"`framework` is {framework!r}; it needs one of {', '.join(FRAMEWORKS)}")
    if isinstance(modules, str):
        raise TypeError(f"`modules` is {modules!r}; it needs a sequence of module names")
    known = KNOWN[framework]
    patch = Patch(_installations.setdefault(framework, Installation(known)), modules)
    if known.register is not None:
        try:
            known.register()
        except BaseException:
            patch.undo()
            raise
    return patch
