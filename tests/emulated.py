"""The CUDA kernels on an emulated device, as the backend ``cuda`` of CPU tensors.

``csrc/tests/emulate.h`` says what that device is. The extension is that of a GPU but for machine
code and run time, so that the backend and the bindings are tested too.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

EMULATED = os.environ.get("GUARD_OPS_EMULATED") == "1"  # `make test-emulated`
FOLDER = Path(__file__).parents[1] / "build" / "emulated"
_kept: list[torch.library.Library] = []  # what it registers is gone with it


def prepare() -> None:
    """Must be called before ``guard_ops`` is imported."""
    path = FOLDER / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is built by `make test-emulated`")
    spec = importlib.util.spec_from_file_location("guard_ops._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["guard_ops._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    count, torch.cuda.device_count = torch.cuda.device_count, lambda: 1
    from guard_ops.backends import cpu, cuda

    torch.cuda.device_count = count
    cuda.supports = lambda device: device.type == "cpu"
    cpu.supports = lambda device: False  # its operators are now the others
    library = torch.library.Library("guard_ops", "IMPL")
    _kept.append(library)
    on_cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for name in torch._C._dispatch_get_all_op_names():
        if not name.startswith("guard_ops::"):
            continue
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
            continue
        name = name.removeprefix("guard_ops::")
        operator = getattr(torch.ops.guard_ops, name).default

        def run(*args: Any, operator: Any = operator) -> Any:
            return operator.redispatch(on_cuda, *args)

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Warning only once for all operators")
            library.impl(name, run, "CPU")


def refused_for_float64(error: TypeError) -> bool:
    """Whether the backend refused a call that does have an operand in float64."""
    if "no float64 kernels" not in str(error):
        return False
    tensors: list[Any] = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__") == "guard_ops.backends.compiled":
            given = frame.f_locals
            tensors += given["t"].latents if "t" in given else [given["v"], given["x"]]
            tensors.append(given.get("noise"))
    return any(x is not None and x.dtype == torch.float64 for x in tensors)
