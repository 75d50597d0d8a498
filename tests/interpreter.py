"""Triton's interpreter, made fast and exact enough for a test suite.

It replaces every function of triton.language by an interpreted one when a kernel starts, again at
every call from one ``@triton.jit`` function to another, and puts them back when the kernel ends.
In a process that only ever interprets, once is enough: two thirds of the time is saved. It also
truncates float32 to bfloat16, where every GPU rounds to nearest even; here it does so too. Before
Triton 3.9 it makes an index of an array of one element, which numpy 2.4 refuses.
"""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import torch


def prepare() -> None:
    """Must be called before the first kernel runs; for processes with TRITON_INTERPRET=1."""
    import triton.language as tl
    from triton.runtime import interpreter

    both = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang(both)
    forever = types.SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda fn: forever
    tl.tensor.__index__ = lambda self: int(self.handle.data.item())

    convert = interpreter._convert_float

    def rounding(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            narrow = torch.from_numpy(np.ascontiguousarray(data)).bfloat16()
            return narrow.view(torch.int16).numpy().view(np.uint16)
        return convert(data, source, target, mode)

    interpreter._convert_float = rounding
