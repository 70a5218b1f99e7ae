"""Register the tuner with PEFT, whose enum of methods is closed.

PEFT looks up a method in three dictionaries by ``config.peft_type``, which is ``peft_names.NORA``.
"""

from __future__ import annotations

from typing import Any, cast

from ..config import AdapterConfig
from ..peft_names import NORA, PREFIX
from .model import NoraModel


def register() -> None:
    """Add the tuner to PEFT's tables, once. Raises ``RuntimeError`` if another package has registered the name."""
    from peft import mapping

    tables: tuple[tuple[dict[Any, Any], Any], ...] = (
        (cast(Any, mapping.PEFT_TYPE_TO_CONFIG_MAPPING), AdapterConfig),
        (cast(Any, mapping.PEFT_TYPE_TO_TUNER_MAPPING), NoraModel),
        (cast(Any, mapping.PEFT_TYPE_TO_PREFIX_MAPPING), PREFIX),
    )
    for table, entry in tables:
        if table.setdefault(NORA, entry) is not entry and table[NORA] != entry:
            raise RuntimeError(f"another package has registered the PEFT method {NORA!r}: {table[NORA]!r}")
