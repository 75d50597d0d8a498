"""Does work that may fail, hang or leave the device unusable, in a process that can be replaced.

An illegal access or a kernel that never ends poisons every later call of its process, so what is
measured after it must be measured in another. As long as nothing fails, one process does it all.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Answer = dict[str, Any]  # has an "error" if something failed
Work = Callable[[Any], Answer]
MESSAGE = 200  # characters of an error that are kept
HUNG = "no result within"  # how the error of what did not answer in time begins


class Worker:
    """Calls ``work(job)`` in a process of its own, and in a new one after each failure.

    ``work`` is a function of a module; jobs and answers are sent to and from the process.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._process: Any = None
        self._connection: Connection | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def ask(self, job: object, seconds: float) -> Answer:
        """The answer to one job, or ``{"error": ...}`` when there is none within ``seconds``."""
        connection = self._connection or self._start()
        try:
            connection.send(job)
            answer: Answer = (
                connection.recv()
                if connection.poll(seconds)
                else {"error": f"{HUNG} {seconds:.0f} s"}
            )
        except (EOFError, OSError):
            self._process.join(1)
            answer = {"error": f"its process ended with {self._process.exitcode}"}
        if "error" in answer:
            self._end()
        return answer

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")  # a fork could not use the device
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._work))
        self._process.start()
        theirs.close()
        return self._connection

    def _end(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.join(5)  # a driver may hold the process for longer
        self._connection = None


def _serve(connection: Connection, work: Work) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks ends this one
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            answer = work(job)
        except Exception as error:
            answer = {"error": first_line(error)}
        connection.send(answer)


def first_line(error: BaseException) -> str:
    """An exception's class and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:MESSAGE]
