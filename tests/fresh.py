"""Programs in an interpreter that has imported torch and nothing of ours.

Importing torch takes seconds, torch._dynamo for guard_ops three more, and the rest of guard_ops
tenths of one: a process that has done the first two is copied (fork) for every program. What is
tested before torch is imported needs a process of its own.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

SERVER = """
import importlib, json, os, sys, traceback
importlib.import_module(sys.argv[1])
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(job["output"], os.O_WRONLY), 1)
        os.dup2(os.open(job["error"], os.O_WRONLY), 2)
        os.chdir(job["folder"])
        os.environ.clear()
        os.environ.update(job["environment"])
        sys.argv = ["-c", *job["arguments"]]
        status = 1
        try:
            exec(job["program"], {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@functools.cache
def _server(imported: str) -> subprocess.Popen[str]:
    """This process's, ended with it."""
    pipe, command = subprocess.PIPE, [sys.executable, "-c", SERVER, imported]
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    atexit.register(server.kill)
    return server


def run(
    program: str,
    *arguments: str,
    environment: Mapping[str, str] = os.environ,
    folder: str | os.PathLike[str] = ".",
    imported: str = "torch._dynamo",
) -> str:
    """What ``program`` printed; it fails where the program does."""
    server = _server(imported)
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as temporary:
        output, error = Path(temporary, "output"), Path(temporary, "error")
        output.touch()
        error.touch()
        job = {"program": program, "arguments": arguments, "environment": dict(environment)}
        job |= {"output": str(output), "error": str(error), "folder": os.fspath(folder)}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        assert int(server.stdout.readline()) == 0, error.read_text()
        return output.read_text()
