"""The address of a server, and the key that it asks for."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from ...errors import UserError, quoted
from ...io.files import read_text

KEY_VARIABLE = "NORA_SERVER_KEY"
"""The environment variable of a key: unlike a flag, other users of the machine cannot read it."""
MAX_KEY = 4096


def check_address(text: str) -> str:
    """``http://HOST:PORT`` or ``https://HOST/PATH``, without a slash at its end. Raises :class:`UserError`."""
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port, or a bracket
        valid = False
    if not valid or not text.isprintable() or " " in text:
        raise UserError(f"{quoted(text)} is not the address of a server: write for example http://localhost:8000")
    if parts.username is not None or parts.password is not None:
        raise UserError(
            f"the address of a server has no user and password, which others could read: give the key in a file, or in "
            f"{KEY_VARIABLE}"
        )
    if parts.query or parts.fragment:
        raise UserError(f"{quoted(text)} has more than an address: leave out what follows '?' and '#'")
    return text.rstrip("/")


def read_key(file: str | Path | None) -> str | None:
    """The key in a file, else in :data:`KEY_VARIABLE`; ``None`` if there is none. Raises :class:`UserError`."""
    if file is None:
        key, where = os.environ.get(KEY_VARIABLE, "").strip(), KEY_VARIABLE
    else:
        key, where = read_text(Path(file).expanduser(), MAX_KEY).strip(), str(file)
        if not key:
            raise UserError(f"{where} has no key: write the key of the server into it, in one line")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"{where} has no key of a server: it must be one line of letters, digits and signs")
    return key or None
