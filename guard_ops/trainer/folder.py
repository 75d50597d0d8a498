"""A run's folder: one process at a time, and what its disk refuses in one sentence."""

from __future__ import annotations

import fcntl
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = "run.lock"


class RunFolderError(RuntimeError):
    """A run's folder cannot be used: another process does, or it cannot be written."""


class FolderLock:
    """Keeps other processes, and other trainers of this one, out of a folder until :meth:`release`.

    The lock is the kernel's (``flock``) on the file ``run.lock``, so it ends with the process,
    however that ends; the file stays, and says who had it last.

    Raises:
        RunFolderError: somebody has the lock, or the folder cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+")
        try:
            self._take(folder)
        except BaseException:
            self._file.close()
            raise

    def _take(self, folder: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read() or "another process"
            raise RunFolderError(
                f"{folder} is in use by {holder}; wait until that has ended (or call its "
                "trainer's close()), or choose another folder"
            ) from error
        except OSError as error:
            warnings.warn(
                f"guard_ops: {folder} is on a file system without locks ({error.strerror}); see to "
                "it yourself that only one process trains in it",
                RuntimeWarning,
                stacklevel=4,
            )
        with writing(folder / LOCK):
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {platform.node()}")
            self._file.flush()

    def release(self) -> None:
        self._file.close()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError inside the block becomes a RunFolderError that names its file, or ``path``."""
    try:
        yield
    except OSError as error:
        reason = f"cannot write {os.fspath(error.filename or path)}: {error.strerror or error}"
        raise RunFolderError(f"{reason}; what was saved before is whole") from error
