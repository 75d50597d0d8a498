"""Runs a command and ends it in time, with every process that it has started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

GRACE_SECONDS = 5.0  # after an interrupt, for the command to say what it has done so far
# A shell's background job ignores interrupts, and so does what it starts, unless that resets them.
HEED = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL);"
    "os.execvp(sys.argv[1], sys.argv[1:])"
)


def run(
    command: Sequence[str],
    seconds: float,
    folder: Path,
    environment: Mapping[str, str],
    output: int | None = None,  # as in subprocess: None is this process's own
    grace: float | None = None,  # instead of GRACE_SECONDS
) -> tuple[int | None, str]:
    """Exit status, None if it took longer than ``seconds``; and what it wrote to a pipe.

    The command runs in a process group of its own, so that whatever it has started (compilers, test
    workers, a kernel that never ends) is interrupted and then killed with it. That also happens
    when this process is interrupted.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        command = [sys.executable, "-c", HEED, *command]
    stderr = subprocess.STDOUT if output is not None else None
    process = subprocess.Popen(
        command, cwd=folder, env=dict(environment), stdout=output, stderr=stderr, text=True,
        errors="replace", start_new_session=True,
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
    """What it still writes within ``seconds``; a driver may never let go of the process."""
    try:
        return process.communicate(timeout=seconds)[0] or ""
    except subprocess.TimeoutExpired as error:
        return error.output.decode(errors="replace") if error.output else ""


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Signals the group, whose id is the process's; no other group gets it while a member lives."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
