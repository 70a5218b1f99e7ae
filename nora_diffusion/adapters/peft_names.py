"""The names by which PEFT knows the tuner: its method, a stand-in for an enum member, and the prefix of its keys."""

from __future__ import annotations

from typing import Any


class _MethodName(str):
    """Stands in for a ``PeftType`` member."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str(self)

    @property
    def name(self) -> str:
        return str(self)


NORA: Any = _MethodName("NORA")
PREFIX = "nora_"
