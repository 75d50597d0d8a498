"""Optional dependencies: imported where they are used, with an error that says what to install."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str) -> Any:
    """The imported ``module``; ``extra`` is the optional dependency group that brings it.

    Raises:
        ModuleNotFoundError: it is not installed; names the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # the package is there, something inside it is missing
        package = {"sklearn": "scikit-learn"}.get(error.name, error.name)
        raise ModuleNotFoundError(
            f"{package} is not installed; this part of guard_ops needs "
            f'`pip install "guard-ops[{extra}]"`',
            name=error.name,
        ) from error
