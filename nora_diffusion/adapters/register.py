"""Makes our method known to PEFT, whose enum of methods is closed.

PEFT looks methods up in three dictionaries by ``config.peft_type``. A ``str`` subclass with ``value`` and ``name``
passes for a member of the enum; this file is the only one that relies on it.
"""

from __future__ import annotations

from typing import Any, cast


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


def register() -> None:
    """Enter the tuner in PEFT's tables once. Raises ``RuntimeError`` if another package took the name."""
    from peft import mapping

    from .config import AdapterConfig
    from .model import NoraModel

    tables: tuple[tuple[dict[Any, Any], Any], ...] = (
        (cast(Any, mapping.PEFT_TYPE_TO_CONFIG_MAPPING), AdapterConfig),
        (cast(Any, mapping.PEFT_TYPE_TO_TUNER_MAPPING), NoraModel),
        (cast(Any, mapping.PEFT_TYPE_TO_PREFIX_MAPPING), PREFIX),
    )
    for table, entry in tables:
        if table.setdefault(NORA, entry) is not entry and table[NORA] != entry:
            raise RuntimeError(f"another package has registered the PEFT method {NORA!r}: {table[NORA]!r}")
