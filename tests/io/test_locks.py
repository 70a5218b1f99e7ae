"""File locks between processes: one holder, released when it dies; and disks without file locks."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from nora_diffusion import UserError
from nora_diffusion.io import files
from nora_diffusion.io.files import FileLock, is_held, locked_folder, write_atomic
from nora_diffusion.training.planning.rundir import RunFolder


def test_a_lock_has_one_holder_and_is_released_when_it_dies(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_held(path)
    with FileLock(path):
        assert is_held(path) and not FileLock(path).try_acquire()
        assert not FileLock(path).acquire(canceled=lambda: True)
    assert not is_held(path)
    code = (
        "import sys, time; from pathlib import Path; from nora_diffusion.io.files import FileLock\n"
        "FileLock(Path(sys.argv[1])).acquire(); print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    assert is_held(path) and is_held(path)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert not is_held(path)


def test_a_lock_file_is_used_where_folders_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked_folder(tmp_path):
        assert not list(tmp_path.iterdir())
    monkeypatch.delattr(os, "O_DIRECTORY")  # as on Windows
    with locked_folder(tmp_path):
        (lock,) = tmp_path.iterdir()
        assert is_held(lock)
    assert not is_held(lock)


def test_temporary_files_of_killed_writers_are_removed(tmp_path: Path) -> None:
    """The next write of the same file removes them, but only those that are old."""
    file = tmp_path / "a[1].safetensors"
    names = {".a[1].safetensors.0123abcd": True, ".a[1].safetensors.0123abce": False, ".a1.safetensors.0123abcd": True}
    for name, is_old in names.items():
        (tmp_path / name).write_bytes(b"half")
        if is_old:
            os.utime(tmp_path / name, (0, 0))
    write_atomic(file, b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*list(names)[1:], file.name])


def test_a_disk_without_locks_is_not_mistaken_for_a_held_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "_lock", refuse)
    with pytest.raises(UserError, match="has no file locks"):
        RunFolder(tmp_path).__enter__()
    assert not is_held(tmp_path / ".lock")
    with locked_folder(tmp_path):  # on a network drive this runs unlocked instead of failing
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("shared", [False, True])
def test_a_forked_child_does_not_hold_the_locks_of_its_parent(shared: bool, tmp_path: Path) -> None:
    """The parent's lock stays, and is free when the parent releases it, while the child lives on."""
    file, folder = tmp_path / "lock", tmp_path / "folder"
    folder.mkdir()
    locks = [FileLock(file), FileLock(folder)]
    assert all(lock.try_acquire(shared) for lock in locks)
    (reader, writer), (tried, trying) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(writer)
            taken = [FileLock(path).try_acquire() for path in (file, folder)]  # the parent holds them
            locks[0].release()  # does nothing
            os.write(trying, b"x")
            os.read(reader, 1)
        finally:
            os._exit(1 if any(taken) else 0)
    try:
        os.read(tried, 1)
        assert is_held(file) != shared
        for lock in locks:
            lock.release()
        assert not is_held(file)
        assert FileLock(folder).acquire(canceled=lambda: True)
    finally:
        os.close(writer)
    assert os.waitpid(child, 0)[1] == 0
    for handle in (reader, tried, trying):
        os.close(handle)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_can_take_a_lock_that_its_parent_held(tmp_path: Path) -> None:
    """It would wait for itself if it had inherited the handle."""
    lock = FileLock(tmp_path / "lock")
    with lock:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0 if FileLock(lock.path).acquire(canceled=lambda: True) else 1)
    os.close(writer)
    assert os.waitpid(child, 0)[1] == 0
    os.close(reader)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forks_while_threads_take_locks(tmp_path: Path) -> None:
    """No child keeps a lock, whenever the fork happens."""
    stop = threading.Event()

    def take() -> None:
        while not stop.is_set():
            with FileLock(tmp_path / "lock"):
                pass

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    children = []
    reader, writer = os.pipe()
    for _ in range(30):
        child = os.fork()
        if child == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        children.append(child)
    stop.set()
    for thread in threads:
        thread.join()
    held = is_held(tmp_path / "lock")
    os.close(writer)
    os.close(reader)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 30
    assert not held


@pytest.mark.skipif(os.name == "nt", reason="only handles of POSIX are passed on")
def test_a_program_that_gets_the_handle_holds_the_lock(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    lock.acquire()
    assert lock.handle is not None
    program = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, pass_fds=[lock.handle]
    )
    lock.release()
    assert is_held(lock.path)
    program.communicate()
    assert not is_held(lock.path)


@pytest.mark.parametrize("call", ["open", "truncate", "write"])
@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_at_the_lock_file_is_a_sentence_and_leaves_nothing(
    call: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, original = tmp_path / "run", getattr(os, call)
    if there:
        folder.mkdir()

    def full(*args: Any) -> Any:
        if call != "open" or args[0] == folder / ".lock":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(UserError, match=r"\.lock: No space left on device; free space"):
            RunFolder(folder).__enter__()
    assert folder.exists() == there
    with RunFolder(folder):  # the lock is free again
        assert is_held(folder / ".lock")
