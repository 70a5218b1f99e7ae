"""API keys: random tokens, of which a file holds the names and SHA-256 hashes."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
from pathlib import Path

from ....errors import UserError
from ....io.files import locked_folder, read_text, write_atomic

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
LINE = re.compile(rf"({NAME.pattern})\s+([0-9a-f]{{64}})")


def new_key(file: Path, name: str) -> str:
    """Make a key, append its name and hash to ``file``, and return it; it is stored nowhere else.

    The token has 256 random bits, so a plain hash of it cannot be guessed.
    """
    if not NAME.fullmatch(name):
        raise UserError("the name of a key has letters, digits, '_', '.' and '-', at most 64: choose another")
    with locked_folder(file.parent):
        known = read_keys(file) if file.exists() else {}
        if name in known.values():
            raise UserError(f"there is a key {name!r} already: remove its line from {file} first")
        token = f"nora-{secrets.token_urlsafe(32)}"
        lines = "".join(f"{own} {digest}\n" for digest, own in [*known.items(), (_digest(token), name)])
        write_atomic(file, lines)
        file.chmod(0o600)
    return token


def read_keys(file: Path) -> dict[str, str]:
    """The names of keys by their hashes. Raises :class:`UserError` for a line that is not one."""
    found: dict[str, str] = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            match = LINE.fullmatch(line.strip())
            if match is None:
                raise UserError(f"{file}: line {number} is not a name and a SHA-256: remove it")
            found[match[2]] = match[1]
    return found


class Keys:
    """Whose a request is, by its ``Authorization``: ``Bearer KEY``, or ``Basic`` with the key as the password."""

    def __init__(self, names: dict[str, str]) -> None:
        self._names = names

    def owner(self, authorization: str) -> str | None:
        """The name of the key; ``None`` for a wrong one."""
        digest = _digest(_token(authorization))
        found = None
        for own, name in self._names.items():  # looks at all of them, in constant time
            if hmac.compare_digest(own, digest):
                found = name
        return found


def _token(authorization: str) -> str:
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return value.strip() if scheme.lower() == "bearer" else ""


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
