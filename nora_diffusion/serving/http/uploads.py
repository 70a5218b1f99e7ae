"""Uploaded adapters: ``HASH/NAME.safetensors`` in one folder, so that no two contents ever share a path."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...formats.adapter_info import AdapterInfo
from ...generation.library import NamedAdapter
from ...io.files import make_folder, sha256, user_errors
from ..cluster.front import AnyEngine
from .answers import Refused

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
MAX_UPLOAD = 256 * 2**20
"""Largest adapter in bytes."""
MAX_STORED = 4 * 2**30
"""All uploaded adapters together, in bytes."""
MAX_SUBJECTS = 1000
SPARE = 256 * 2**20
"""Bytes of the disk that uploads leave free."""
NO_ROOM = "the server has no room for more subjects: delete some first"


class Uploads:
    """The folder of uploaded adapters. What an interrupted upload or request left is removed."""

    def __init__(self, folder: Path) -> None:
        self.folder = make_folder(folder)
        for left in folder.glob(".upload-*"):
            left.unlink(missing_ok=True)

    def files(self) -> list[Path]:
        """The adapters' files."""
        return sorted(path for path in self.folder.glob("*/*.safetensors") if NAME.fullmatch(path.stem))

    def adapters(self) -> list[NamedAdapter]:
        """The adapters by their names."""
        return [NamedAdapter(path.stem, str(path)) for path in self.files()]

    async def receive(self, chunks: AsyncIterator[bytes]) -> Path:
        """Write a body to a temporary file. Raises :class:`Refused` for one that is too large, or without room."""
        files = self.files()
        stored = sum(path.stat().st_size for path in files)
        handle, name = tempfile.mkstemp(prefix=".upload-", suffix=".safetensors", dir=self.folder)
        path, size = Path(name), 0
        try:
            with os.fdopen(handle, "wb") as file:
                async for chunk in chunks:
                    size += len(chunk)
                    self._check_room(size, stored, len(files))
                    file.write(chunk)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path

    def hold(self, content: bytes) -> Path:
        """Write an adapter of one request to a temporary file, which its caller removes."""
        self._check_disk()
        handle, name = tempfile.mkstemp(prefix=".upload-", suffix=".safetensors", dir=self.folder)
        path = Path(name)
        try:
            with user_errors(path), os.fdopen(handle, "wb") as file:
                file.write(content)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path

    def _check_disk(self) -> None:
        if shutil.disk_usage(self.folder).free < SPARE:
            raise Refused(507, NO_ROOM)

    def check(self, path: Path, engine: AnyEngine, what: str) -> AdapterInfo:
        """The description of a temporary file, which fits the base. Raises :class:`UserError` about ``what``."""
        try:
            return engine.ask(lambda pipe: checked(path, pipe))
        except UserError as error:  # its temporary name says nothing
            raise UserError(str(error).replace(str(path), what).replace(path.name, what)) from error

    def _check_room(self, size: int, stored: int, count: int) -> None:
        if size > MAX_UPLOAD:
            raise Refused(413, f"the adapter is too large: send at most {MAX_UPLOAD >> 20} MiB")
        if size + stored > MAX_STORED or count >= MAX_SUBJECTS:
            raise Refused(507, NO_ROOM)
        self._check_disk()

    def keep(self, path: Path, name: str, engine: AnyEngine) -> tuple[NamedAdapter, AdapterInfo]:
        """Check a received file against the base, and keep it. The temporary file is gone in any case.

        Raises :class:`UserError` for a damaged file, one of another base, a foreign one that is no plain LoRA, and one
        with a shared basis.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(path.unlink, missing_ok=True)
            info = self.check(path, engine, "the file")
            kept = self.folder / sha256(path)[:16] / f"{name}.safetensors"
            with user_errors(kept):
                kept.parent.mkdir(exist_ok=True)
                path.replace(kept)
        info.path, info.sha256 = str(kept), sha256(kept)
        return NamedAdapter(name, str(kept)), info

    def delete(self, adapter: NamedAdapter) -> None:
        """Remove the file of an adapter."""
        path = Path(adapter.path)
        with user_errors(path):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()


def checked(path: Path, pipe: Any) -> AdapterInfo:
    """The description of an uploaded file. Raises :class:`UserError` unless it can be loaded as it is."""
    from ...conversion.plain_lora import as_adapter
    from ...formats.adapter_file import inspect_adapter
    from ...loaders import check_adapter

    info = inspect_adapter(path, hashed=False)
    if not info.is_ours:
        return as_adapter(pipe, info)[0]
    if info.basis == "shared":
        raise UserError("the adapter needs the file of a shared basis, which an upload does not have: save it with one")
    return check_adapter(pipe, path)[0]
