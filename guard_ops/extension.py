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
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

NOT_BUILT = (
    "the C++ kernels were not built when guard-ops was installed, for want of a C++ compiler or "
    "because build isolation hid torch (pip install --no-build-isolation)"
)
ROOT = Path(__file__).resolve().parents[1]
SOURCE = str(ROOT) if (ROOT / "setup.py").is_file() else "path/to/guard-ops-source"
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
    """The versions it was built for, ``{"torch": "2.14.1", "cuda": "13.0" or None}``; else None."""
    spec = importlib.util.find_spec("guard_ops._C")
    path = Path(spec.origin).with_suffix(".json") if spec and spec.origin else None
    if path is None or not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return record


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
        return None, NOT_BUILT, False
    record = build_record()
    reason = mismatch(record, torch.__version__, torch.version.cuda) if record else ""
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


def _name(version: str, cuda: str | None) -> str:
    return f"torch {version} with CUDA {cuda}" if cuda else f"torch {version} without CUDA"


def _numbers(version: str) -> list[str]:
    return version.split("+")[0].split(".")
