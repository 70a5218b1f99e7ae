"""What a server says about itself and its subjects, with every value checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar, get_type_hints

from ...io.untrusted import conform

T = TypeVar("T")
LARGEST = 2**64


@dataclass(frozen=True)
class About:
    """A server: its release, its base, the defaults of that base, and the limits of a request."""

    version: str
    base: str
    embedded: bool
    steps: int
    guidance: float
    max_steps: int
    max_side: int
    max_count: int


@dataclass(frozen=True)
class Subject:
    """A subject that requests may name. ``ranks`` and ``parameters`` describe its adapter."""

    name: str
    trigger: str = ""
    class_word: str = ""
    instance_prompt: str = ""
    method: str = ""
    ranks: str = ""
    parameters: int = 0
    sha256: str = ""
    bytes: int = 0


def read(kind: type[T], values: Any) -> T:
    """The dataclass ``kind`` from a JSON object; fields that it does not have are ignored. Raises ``ValueError``."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{kind.__name__.lower()} is not an object")
    hints, found = get_type_hints(kind), {}
    for own in fields(kind):  # type: ignore[arg-type]
        if own.name in values:
            found[own.name] = conform(values[own.name], hints[own.name], own.name, LARGEST)
        elif own.default is MISSING:
            raise ValueError(f"{own.name} is missing")
    return kind(**found)
