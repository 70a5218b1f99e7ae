"""The private folder for temporary files, and the environment that Gradio reads."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ...errors import UserError
from ...io.files import FileLock, NoLocksError, is_held, user_errors

PREFIX, LOCK = "nora_app_", "alive.lock"


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A new folder that only this user can read, removed at the end. Folders of killed apps are removed first.

    Within it, ``work`` is the empty working folder, ``files`` is what the server may serve, and ``temporary`` holds the
    temporary files of this process.
    """
    parent = Path(tempfile.gettempdir())
    remove_abandoned(parent)
    with user_errors(parent):
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))  # mode 0700
    lock = FileLock(folder / LOCK)
    before = tempfile.tempdir
    try:
        try:
            lock.try_acquire()
        except NoLocksError:
            lock.path.unlink()  # without locks, a folder in use looks like an abandoned one
        with user_errors(folder):
            for name in ("work", "files", "temporary"):
                (folder / name).mkdir()
        tempfile.tempdir = str(folder / "temporary")  # photos are copied there for a check of the settings
        yield folder
    finally:
        tempfile.tempdir = before
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(parent: Path) -> None:
    """Remove the private folders of this user's apps that were killed: nobody holds their lock."""
    for folder in parent.glob(f"{PREFIX}*"):
        lock = folder / LOCK
        if folder.is_symlink() or not lock.is_file():
            continue
        with contextlib.suppress(OSError, UserError):
            mine = not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()
            if mine and not is_held(lock):
                shutil.rmtree(folder, ignore_errors=True)


def clean_environment(files: Path) -> None:
    """Remove all ``GRADIO_*`` environment variables, which could undo these defaults, and set our own.

    Call it before gradio is imported.
    """
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ |= {
        "GRADIO_TEMP_DIR": str(files),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_SSR_MODE": "False",
        "GRADIO_SHARE": "False",
        "GRADIO_MCP_SERVER": "False",
        "GRADIO_RUN_HISTORY": "False",
    }
