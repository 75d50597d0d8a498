"""A command that ends in time, with every process that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

GRACE_SECONDS = 5.0  # to say what was done so far, after an interrupt
# A shell's background job ignores interrupts, and so does what it starts, unless told not to.
HEED = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL);"
    "os.execvp(sys.argv[1], sys.argv[1:])"
)


def run(
    command: Sequence[str],
    seconds: float,
    folder: Path,
    environment: Mapping[str, str],
    output: int | None = None,  # as of subprocess: None is this process's own
    grace: float | None = None,  # instead of GRACE_SECONDS
) -> tuple[int | None, str]:
    """Exit status, None when it took longer than ``seconds``; and what it wrote to a pipe.

    In a group of its own: what it started (compilers, test workers, a kernel that never ends) is
    interrupted, then killed, with it; also when this process is interrupted itself.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        command = [sys.executable, "-c", HEED, *command]
    stderr = subprocess.STDOUT if output is not None else None
    process = subprocess.Popen(
        command, cwd=folder, env=dict(environment), stdout=output, stderr=stderr, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=seconds)
        return process.returncode, text or ""
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGINT)
        return None, _rest(process, GRACE_SECONDS if grace is None else grace)
    finally:
        _signal(process, signal.SIGKILL)
        _rest(process, GRACE_SECONDS)


def _rest(process: subprocess.Popen[str], seconds: float) -> str:
    """What it still writes; not waited for longer, should a driver not let go of it."""
    try:
        return process.communicate(timeout=seconds)[0] or ""
    except subprocess.TimeoutExpired as error:
        return error.output.decode(errors="replace") if error.output else ""


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """To the whole group; its id is the process's, and nobody else's while a member lives."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
