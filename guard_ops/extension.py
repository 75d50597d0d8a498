"""The compiled extension: whether it fits the torch that runs, and loading it if it does.

An extension that was built for another torch fails with ``undefined symbol`` when it is loaded, or
worse, later. So the torch it was built for is read first, from the record that the build put beside
it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import shlex
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

NOT_BUILT = (
    "the C++ kernels were not built: guard-ops was installed with GUARD_OPS_PURE=1, or this is a "
    "checkout in which nothing has been compiled"
)
HIDES = "hides the installed"  # said of a copy of this package that has been imported instead
PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
SOURCE = shlex.quote(str(ROOT)) if (ROOT / "setup.py").is_file() else "path/to/guard-ops-source"
REBUILD = f"pip install --no-build-isolation --no-deps --force-reinstall --no-cache-dir {SOURCE}"


def load() -> ModuleType:
    """``guard_ops._C``, which registers ``torch.ops.guard_ops``.

    Raises:
        ImportError: it was not built, or is for another torch, or does not load; the message says
            which. Of the latter two the first call also warns.
    """
    module, reason, _ = _load()
    if module is None:
        raise ImportError(reason)
    return module


def warned() -> bool:
    """Whether :func:`load` has warned of an extension that is there but cannot be used."""
    return _load()[2]


def build_record() -> dict[str, Any] | None:
    """The versions it was built for, ``{"torch": "2.14.1", "cuda": "13.0" or None}``; else None.

    Raises:
        ValueError: the build's record is damaged; the message names the file.
    """
    spec = importlib.util.find_spec("guard_ops._C")
    path = Path(spec.origin).with_suffix(".json") if spec and spec.origin else None
    if path is None or not path.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        if isinstance(record["torch"], str) and isinstance(record["cuda"], str | None):
            return record
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(f"what the compiled kernels were built for cannot be read from {path}")


def installed_elsewhere() -> Path | None:
    """Another copy of the package on the path, with kernels, which this one hides.

    That is what a checkout does as the current folder, after ``pip install .`` in it.
    """
    for entry in sys.path:
        folder = Path(entry or ".", "guard_ops")
        if any(folder.glob("_C.*.so")) and folder.resolve() != PACKAGE:
            return folder.resolve()
    return None


def mismatch(record: dict[str, Any], version: str, cuda: str | None) -> str:
    """Why an extension with that ``record`` cannot run under this torch; empty if it can.

    libtorch's C++ interface is the same within one minor release of torch, and libcudart's within
    one major release of CUDA. An extension without CUDA kernels runs under torch with or without
    CUDA.
    """
    if _numbers(record["torch"])[:2] == _numbers(version)[:2]:
        wanted = record["cuda"]
        if not wanted or (cuda and _numbers(cuda)[0] == _numbers(wanted)[0]):
            return ""
    return (
        f"the compiled kernels were built for {_name(record['torch'], record['cuda'])}, "
        f"this is {_name(version, cuda)}"
    )


@functools.cache
def _load() -> tuple[ModuleType | None, str, bool]:
    """(the module, why there is none, whether a warning said so); cached, so it warns only once."""
    if importlib.util.find_spec("guard_ops._C") is None:
        return None, _not_built(), False
    record = None
    try:
        record = build_record()
        reason = mismatch(record, torch.__version__, torch.version.cuda) if record else ""
    except ValueError as damaged:
        reason = str(damaged)
    if not reason:
        try:
            return importlib.import_module("guard_ops._C"), "", False
        except (ImportError, OSError) as error:
            built = f"built for {_name(record['torch'], record['cuda'])}, " if record else ""
            now = _name(torch.__version__, torch.version.cuda)
            reason = f"the compiled kernels, {built}do not load under {now}: {error}"
    warnings.warn(
        f"guard_ops: {reason}; they are not used, GPU tensors run on Triton where it is available "
        f"and all others on plain PyTorch. To rebuild for this torch: {REBUILD}",
        RuntimeWarning,
        stacklevel=2,
    )
    return None, reason, True


def _not_built() -> str:
    installed = installed_elsewhere()
    if installed is None:
        return NOT_BUILT
    return f"{PACKAGE} has no C++ kernels and {HIDES} {installed}, which has some"


def _name(version: str, cuda: str | None) -> str:
    return f"torch {version} with CUDA {cuda}" if cuda else f"torch {version} without CUDA"


def _numbers(version: str) -> list[str]:
    return version.split("+")[0].split(".")
