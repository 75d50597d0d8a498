"""The other end of a contender's pipe. It imports the package only once its environment is set."""

from __future__ import annotations

import os
import pickle
import traceback
import warnings
from typing import Any


def serve(pipe: Any, environment: dict[str, str]) -> None:
    """A process's life: it says which backend and instruction set it has, then answers calls."""
    os.environ.update(environment)
    warnings.simplefilter(
        "ignore"
    )  # an instruction set that is absent is seen from the answer to "who"
    import emulated
    import torch

    if emulated.EMULATED:
        emulated.prepare()
    import interpreter
    import operations

    from guard_ops.backends import compiled, select

    torch.set_num_threads(1)
    backend = select(torch.device("cpu")).NAME
    if backend == "triton":
        interpreter.prepare()
    while True:
        try:
            message = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            if message == "who":
                answer: Any = {"backend": backend, "cpu_isa": compiled.build_info()["cpu_isa"]}
            else:
                answer = operations.run(message)
            reply = ("result", answer)
        except Exception:
            reply = ("error", traceback.format_exc())
        pipe.send_bytes(pickle.dumps(reply))
