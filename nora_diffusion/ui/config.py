"""Settings of the app, checked before anything starts."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from ..pipelines.base import BaseSource

DEFAULT_PORT = 7860
DEFAULT_LIBRARY = "outputs/library"
CACHE_SECONDS = (3600, 24 * 3600)
"""Gradio's file cache: seconds between two cleanups, and the age at which a file is deleted."""


@dataclass
class AppConfig:
    """How to serve the app.

    ``source``: the base; trainings use its ``base``, ``variant`` and ``revision`` too. ``listen``: address to bind.
    ``library``: folder of adapters; pictures go to ``pictures/`` in it. ``auth``: ``user:password``. ``allow_changes``:
    off loopback, let users train, upload and delete too.
    """

    source: BaseSource = field(default_factory=BaseSource)
    port: int = DEFAULT_PORT
    listen: str = "127.0.0.1"
    library: str = DEFAULT_LIBRARY
    auth: str | None = None
    allow_changes: bool = False

    def check(self) -> None:
        """Raises :class:`UserError` for the first setting that makes no sense or is not safe."""
        self.source.check()
        if not 0 <= self.port <= 65535:
            raise UserError(f"port={self.port} is out of range: choose 1 to 65535, or 0 for any free one")
        if self.auth is not None and not all(self.credentials):
            raise UserError("--auth needs the form user:password, neither of them empty")
        if not self.on_loopback and self.auth is None:
            raise UserError(
                f"--listen {self.listen} lets other machines in: give --auth user:password as well, "
                "or leave --listen out to stay on this machine"
            )

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the app."""
        try:
            return ipaddress.ip_address(self.listen).is_loopback
        except ValueError:
            return self.listen == "localhost"

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
        """The library as an absolute path, since the server leaves the folder it was started in."""
        return Path(self.library).expanduser().resolve()
