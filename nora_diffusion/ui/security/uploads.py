"""What clients upload: a folder for each request, removed unless the request succeeds, and a limit on their size."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response

from ...errors import UserError, reason
from ...io.files import make_folder
from ..config import CACHE_SECONDS

UPLOAD = "/gradio_api/upload"
MAX_UPLOAD = 512 * 2**20
"""Largest body of an upload in bytes, all files of the request together."""
MAX_STORED = 4 * 2**30
"""Largest size in bytes of all uploads together. Old ones make room for new ones."""
SMALLEST = 4096
"""Bytes that a file counts at least, as it does on a disk."""
IN_USE_SECONDS = 3600.0
"""Uploads younger than this are not removed to make room: a page may still use them."""
SPARE = 256 * 2**20
"""Bytes of the disk that uploads leave free."""


class Uploads:
    """The uploads in ``folder``. Images that the app makes are elsewhere and do not count."""

    def __init__(self, folder: Path) -> None:
        self.folder = make_folder(folder)
        self._sizes: dict[Path, int] = {}
        """Bytes of each upload, oldest first: measured, or what an unfinished one announced."""
        self._finished: dict[Path, float] = {}

    def attach(self, site: Any) -> None:
        """Replace the upload route of Gradio's app ``site``, which keeps the files of a broken connection.

        The new route has the same log-in check as ``/config``.
        """
        check = next(route.dependencies for route in site.routes if getattr(route, "path", "") == "/config")
        site.router.routes.insert(0, APIRoute(UPLOAD, self.receive, methods=["POST"], dependencies=check))

    async def receive(self, request: Request, upload_id: str | None = None) -> Response:
        """Store the files of a request. Answers with their paths, or with 400, 413 or 507 and the reason."""
        from gradio.route_utils import MultiPartException, upload_fn
        from gradio.routes import file_upload_statuses

        progress = file_upload_statuses if upload_id else None
        try:
            with self.room(int(request.headers["content-length"])) as folder:
                files, *_ = await upload_fn(request, folder, MAX_UPLOAD, upload_id, upload_progress=progress)
        except MultiPartException as error:
            return PlainTextResponse(error.message, 413 if "maximum allowed size" in error.message else 400)
        except ClientDisconnect:
            return PlainTextResponse("the upload did not arrive completely", 400)
        except TypeError:  # of Gradio: a part of the form is not a file
            return PlainTextResponse("the upload contains a file without a name", 400)
        except UserError as error:
            return PlainTextResponse(str(error), 507)
        except OSError as error:
            return PlainTextResponse(
                f"the disk with the app's temporary folder cannot be written: {reason(error)}", 507
            )
        return JSONResponse([str(file) for file in files])

    @contextlib.contextmanager
    def room(self, length: int) -> Iterator[Path]:
        """A new folder for an upload of ``length`` bytes, removed if the block raises.

        Raises :class:`UserError` if there is no room.
        """
        self._make_room(length)
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        self._sizes[folder] = length
        try:
            yield folder
        except BaseException:
            self._remove(folder)
            raise
        self._sizes[folder] = sum(max(file.lstat().st_size, SMALLEST) for file in folder.rglob("*") if file.is_file())
        self._finished[folder] = time.monotonic()

    def _make_room(self, length: int) -> None:
        now = time.monotonic()
        for folder, finished in list(self._finished.items()):  # oldest first
            full = sum(self._sizes.values()) + length > MAX_STORED
            if now - finished > (IN_USE_SECONDS if full else CACHE_SECONDS[1]):
                self._remove(folder)
        if sum(self._sizes.values()) + length > MAX_STORED:
            raise UserError("too much was uploaded within an hour: wait, or restart the app")
        if shutil.disk_usage(self.folder).free < length + SPARE:
            raise UserError("the disk with the app's temporary folder is full: free space on it")

    def _remove(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self._sizes.pop(folder, None)
        self._finished.pop(folder, None)
