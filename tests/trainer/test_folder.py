import errno
import multiprocessing
import os
import signal

import pytest
from tiny import full_disk

from guard_ops.trainer import RunFolderError, folder
from guard_ops.trainer.folder import FolderLock, write_whole, writing

FORK = multiprocessing.get_context("fork")


def hold(path, ready):
    lock = FolderLock(path)
    ready.send(os.getpid())
    signal.pause()
    lock.release()


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of ``tmp_path``."""
    ready, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=hold, args=(tmp_path, theirs))
    process.start()
    assert ready.recv() == process.pid
    yield process
    process.kill()
    process.join()


def test_a_second_process_is_refused_in_a_sentence_that_names_folder_and_holder(tmp_path, holder):
    before = (tmp_path / "run.lock").stat().st_mtime_ns
    with pytest.raises(RunFolderError) as refused:
        FolderLock(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path} is in use by process {holder.pid} on ")
    assert (tmp_path / "run.lock").stat().st_mtime_ns == before


def test_a_killed_holder_leaves_no_lock(tmp_path, holder):
    holder.kill()
    holder.join()
    lock = FolderLock(tmp_path)
    assert (tmp_path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")
    lock.release()
    FolderLock(tmp_path).release()


def test_releasing_does_not_wait_for_a_forked_process(tmp_path):
    lock, (reading, writing_end) = FolderLock(tmp_path), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing_end)
        os.read(reading, 1)  # until the parent closes its end
        os._exit(0)
    try:
        lock.release()
        FolderLock(tmp_path).release()
    finally:
        os.close(writing_end)
        os.waitpid(child, 0)
        os.close(reading)


def test_a_forked_process_does_not_release_its_parents_lock(tmp_path):
    lock = FolderLock(tmp_path)
    child = os.fork()
    if child == 0:
        lock.release()
        os._exit(0)
    assert os.waitpid(child, 0) == (child, 0)
    with pytest.raises(RunFolderError, match="is in use by"):
        FolderLock(tmp_path)
    lock.release()
    lock.release()  # a second time is nothing


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder.fcntl, "flock", flock)
    with pytest.warns(RuntimeWarning, match="is on a file system without locks"):
        FolderLock(tmp_path).release()


def test_a_file_that_is_written_whole_is_there_or_as_it_was(tmp_path):
    path = tmp_path / "file"
    for before in (None, b"before"):
        with full_disk(4), pytest.raises(RunFolderError, match=r"cannot write .*File too large"):
            write_whole(path, b"contents")
        assert (path.read_bytes() if path.exists() else None) == before
        assert [p.name for p in tmp_path.iterdir()] == [path.name] * path.exists()
        path.write_bytes(b"before")
    write_whole(path, b"contents")
    assert path.read_bytes() == b"contents"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_what_the_disk_refuses_names_the_file(tmp_path, code):
    with pytest.raises(RunFolderError) as refused, writing(tmp_path):
        raise OSError(code, os.strerror(code), str(tmp_path / "x"))
    expected = f"cannot write {tmp_path / 'x'}: {os.strerror(code)}; what was saved before is whole"
    assert str(refused.value) == expected
    with pytest.raises(RunFolderError, match=f"^cannot write {tmp_path}: "), writing(tmp_path):
        raise OSError(code, os.strerror(code))
