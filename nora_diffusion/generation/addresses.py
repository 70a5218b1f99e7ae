"""Adapters as a command line names them: ``path:weight``, ``label=path``."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..formats.adapter_file import split_address
from .tags import parse_weight


def parse_adapter(text: str) -> tuple[str, float]:
    """Split ``path[:weight]`` at its last colon, unless that is part of the path: ``C:\\dog``, or a name that exists.

    Raises :class:`UserError` for a weight that is not a number, and if both readings name something that exists.
    """
    path, colon, tail = text.rpartition(":")
    if not colon or not path or "/" in tail or "\\" in tail:
        return text, 1.0
    if exists(text):
        if exists(path):
            raise UserError(f"{text!r} may be {path} with a weight, or a name: write {text}:1 for the name")
        return text, 1.0
    return path, parse_weight(tail, f"--adapter {text!r}")


def split_label(text: str) -> tuple[str, str]:
    """``(label, path)`` of ``[label=]path``; an equals sign in a path is not a label's. The label may be empty."""
    label, equals, path = text.partition("=")
    if not equals or "/" in label or "\\" in label or exists(text) or exists(text.rpartition(":")[0]):
        return "", text
    return label, path


def exists(path: str) -> bool:
    """Whether a path, or the address of a subject in an existing pack, names something. Never raises."""
    address = split_address(path)
    if address and ":" in address[1]:  # no subject has a colon in its name
        return False
    try:
        return bool(path) and Path(address[0] if address else path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False
