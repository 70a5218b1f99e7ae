"""File locks between processes: one holder, released when it dies; and disks without file locks."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

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
