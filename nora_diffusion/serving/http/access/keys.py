"""API keys: random tokens, of which a file holds the names and SHA-256 hashes, with the share and limits of each.

A line is ``NAME HASH``, and after it ``weight=2``, ``rate=60`` and ``quota=1000`` where they are not the usual ones.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ....errors import UserError
from ....generation.settings import check_range
from ....io.files import locked_folder, read_text, write_atomic

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
LINE = re.compile(rf"({NAME.pattern})\s+([0-9a-f]{{64}})((?:\s+[a-z]+=\S+)*)")
FORM = "a name, a SHA-256, and perhaps weight=2, rate=60 or quota=1000"
LIMITS: dict[str, tuple[Callable[[str], float], float, float]] = {
    "weight": (float, 0.001, 1000), "rate": (float, 0.1, 1e6), "quota": (int, 0, 10**9),
}  # fmt: skip
"""The settings of a key with their types and ranges."""


@dataclass(frozen=True)
class Key:
    """A key. ``weight``: its share of the engine. ``rate``: requests a minute. ``quota``: pictures a day (UTC)."""

    name: str
    digest: str
    weight: float = 1.0
    rate: float | None = None
    quota: int | None = None

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UserError("the name of a key has letters, digits, '_', '.' and '-', at most 64: choose another")
        for name, (_, low, high) in LIMITS.items():
            if (value := getattr(self, name)) is not None:
                check_range(name, value, low, high)

    def __str__(self) -> str:
        given = [own.name for own in fields(self)[2:] if getattr(self, own.name) != own.default]
        return " ".join([self.name, self.digest, *(f"{name}={getattr(self, name)}" for name in given)])


def new_key(file: Path, name: str, weight: float = 1.0, rate: float | None = None, quota: int | None = None) -> str:
    """Make a key, append its line to ``file``, and return it; it is stored nowhere else.

    The token has 256 random bits, so a plain hash of it cannot be guessed.
    """
    token = f"nora-{secrets.token_urlsafe(32)}"
    key = Key(name, _digest(token), weight, rate, quota)
    with locked_folder(file.parent):
        text = read_text(file) if file.exists() else ""
        if any(own.name == name for own in _parse(text, file)):
            raise UserError(f"there is a key {name!r} already: remove its line from {file} first")
        write_atomic(file, text + ("\n" if text and not text.endswith("\n") else "") + f"{key}\n")
        file.chmod(0o600)
    return token


def read_keys(file: Path) -> list[Key]:
    """The keys of a file. Raises :class:`UserError` for a line that is not one."""
    return _parse(read_text(file), file)


def _parse(text: str, file: Path) -> list[Key]:
    found = dict[str, Key]()
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            try:
                key = _key(line.strip())
            except ValueError as error:
                raise UserError(f"{file}: line {number}: {error}") from None
            if key.name in found:
                raise UserError(f"{file}: line {number}: there is a key {key.name!r} already; give it another name")
            found[key.name] = key
    return list(found.values())


def _key(line: str) -> Key:
    match = LINE.fullmatch(line)
    if match is None:
        raise UserError(f"it is not {FORM}: mend or remove it")
    values = dict[str, float]()
    for setting in match[3].split():
        name, _, text = setting.partition("=")
        if name not in LIMITS or name in values:
            raise UserError(f"{setting[:40]!r} is unknown or repeated: write {FORM}")
        try:
            values[name] = LIMITS[name][0](text)
        except ValueError:
            raise UserError(f"{setting[:40]!r} is not a number: write {FORM}") from None
    return Key(match[1], match[2], **values)  # type: ignore[arg-type]


class Keys:
    """Whose a request is, by its ``Authorization``: ``Bearer KEY``, or ``Basic`` with the key as the password."""

    def __init__(self, keys: Sequence[Key], file: Path | None = None) -> None:
        self._keys, self._file = {key.name: key for key in keys}, file
        self._stamp = _stamp(file)

    @classmethod
    def of(cls, file: Path) -> Keys:
        """The keys of a file, which is read again when it changes. Raises :class:`UserError` if it cannot be."""
        if not file.exists():
            raise UserError(f"{file} does not exist: make it, with a first key, by --new_key NAME")
        keys = cls([], file)  # first, so that a change while it is read is noticed
        keys._keys = {key.name: key for key in read_keys(file)}
        return keys

    def refresh(self) -> bool:
        """Read the file again if it has changed; whether there are other keys now.

        Without a readable file, or with one that is damaged or empty, the keys stay as they are.
        """
        if self._file is None or (stamp := _stamp(self._file)) == self._stamp:
            return False
        self._stamp = stamp
        try:
            keys = read_keys(self._file)
            if not keys:
                raise UserError(f"{self._file} has no keys")
        except (UserError, OSError, UnicodeError) as error:
            log.error("the file of keys changed, but the keys stay as they were: %s", error)
            return False
        self._keys = {key.name: key for key in keys}
        log.warning("the keys were read again: there are %d", len(keys))
        return True

    def owner(self, authorization: str) -> Key | None:
        """The key of a request; ``None`` for a wrong one."""
        digest = _digest(_token(authorization))
        found = None
        for key in self._keys.values():  # looks at all of them, in constant time
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def quota(self, name: str) -> int | None:
        """The pictures a day of a key; ``None``: any number."""
        key = self._keys.get(name)
        return key.quota if key else None

    @property
    def weights(self) -> dict[str, float]:
        """The shares of the engine by name."""
        return {key.name: key.weight for key in self._keys.values()}


def _stamp(file: Path | None) -> tuple[int, ...]:
    """What tells that a file was changed or replaced; empty if there is none."""
    try:
        found = file.stat() if file else None
    except OSError:
        return ()
    return (found.st_mtime_ns, found.st_size, found.st_ino) if found else ()


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
