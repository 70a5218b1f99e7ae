"""The app's settings, checked before it starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from ..io.files import real_path
from ..pipelines.base import BaseSource
from ..web.listening import is_loopback

DEFAULT_PORT = 7860
DEFAULT_LIBRARY = "outputs/library"
CACHE_SECONDS = (3600, 24 * 3600)
"""Gradio's file cache: seconds between two cleanups, and the age at which a file is deleted."""


@dataclass
class AppConfig:
    """Settings of the app.

    ``source``: the base; trainings use its ``base``, ``variant`` and ``revision`` too. ``listen``: address to bind.
    ``library``: folder of adapters; generated images go to its sub-folder ``pictures/``. ``auth``: ``user:password``.
    ``allow_changes``: let users on other machines train, upload and delete. ``server``: address of a server that
    generates, instead of ``source``; ``server_key``: file of its key.
    """

    source: BaseSource = field(default_factory=BaseSource)
    port: int = DEFAULT_PORT
    listen: str = "127.0.0.1"
    library: str = DEFAULT_LIBRARY
    auth: str | None = None
    allow_changes: bool = False
    server: str | None = None
    server_key: str | None = None

    def check(self) -> None:
        """Raise :class:`UserError` for the first setting that is invalid or not safe."""
        if not 0 <= self.port <= 65535:
            raise UserError(f"port={self.port} is out of range: choose 1 to 65535, or 0 for any free port")
        if self.auth is not None and not all(self.credentials):
            raise UserError("--auth must have the form user:password, and neither may be empty")
        if not self.on_loopback and self.auth is None:
            raise UserError(
                f"--listen {self.listen} opens the app to other machines: add --auth user:password, "
                "or omit --listen to use it on this machine only"
            )
        if self.server_key is not None and self.server is None:
            raise UserError("--server_key is the key of a server: give its address by --server too")
        if self.server is None:
            self.source.check()  # last, as it imports torch
            return
        if self.source != BaseSource():
            raise UserError(
                "--server generates with the base of the server: leave out --base, --device, --dtype, --variant and "
                "--revision"
            )
        from ..serving.client import check_address, read_key  # late: --help needs no PIL

        check_address(self.server)
        read_key(self.server_key)

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can connect to the app."""
        return is_loopback(self.listen)

    @property
    def credentials(self) -> tuple[str, str]:
        """User and password; both empty without ``auth``."""
        user, _, password = (self.auth or "").partition(":")
        return user, password

    @property
    def may_change(self) -> bool:
        """Whether users may train, upload and delete."""
        return self.on_loopback or self.allow_changes

    @property
    def library_folder(self) -> Path:
        """The library as an absolute path, since the server changes its working folder."""
        return real_path(Path(self.library).expanduser())
