"""A run's folder: one process at a time, and what its disk refuses in one sentence."""

from __future__ import annotations

import fcntl
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = "run.lock"


class RunFolderError(RuntimeError):
    """A run's folder cannot be used: another process does, or it cannot be written."""


class FolderLock:
    """Keeps other processes, and other trainers of this one, out of a folder until :meth:`release`.

    The lock is the kernel's (``flock``) on the file ``run.lock``, so it ends with the process and
    with processes forked from it, however those end; the file stays, and says who had it last.
    Only the process that took it can release it, which does not wait for the forked ones.

    Raises:
        RunFolderError: somebody has the lock, or the folder cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        path, self._owner = folder / LOCK, os.getpid()
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
        if self._owner == os.getpid() and not self._file.closed:
            with suppress(OSError):  # a file system without locks has none to release
                fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError inside the block becomes a RunFolderError that names its file, or ``path``."""
    try:
        yield
    except OSError as error:
        reason = f"cannot write {os.fspath(error.filename or path)}: {error.strerror or error}"
        raise RunFolderError(f"{reason}; what was saved before is whole") from error


def write_whole(path: Path, contents: bytes) -> None:
    """Write a file under another name first: whatever stops it, ``path`` is whole or as it was."""
    temporary = path.with_name(f"{path.name}.writing")
    try:
        with writing(temporary), temporary.open("wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        with writing(path):
            temporary.replace(path)
    except RunFolderError:
        with suppress(OSError):
            temporary.unlink()
        raise


def aside(path: Path, suffix: str) -> Path:
    """The first name of ``path.suffix``, ``path.suffix-2`` ... that nothing has."""
    name, n = path.with_name(f"{path.name}.{suffix}"), 1
    while os.path.lexists(name):
        n += 1
        name = path.with_name(f"{path.name}.{suffix}-{n}")
    return name


def keep_aside(path: Path) -> None:
    """Rename what is not of this run, with a warning."""
    kept = aside(path, "aside")
    with writing(path):
        path.rename(kept)
    warnings.warn(
        f"guard_ops: {path} is kept as {kept.name}: it is not of this run",
        RuntimeWarning,
        stacklevel=3,
    )
