"""Keys of the tensors in an adapter file: ``<component>.<module path>.nora_<factor>``."""

from __future__ import annotations

from collections.abc import Mapping

from .adapter_info import AdapterInfo

FROZEN = ("A_out", "B_out")
"""Factors of the frozen basis."""


def is_frozen(key: str) -> bool:
    """Whether a key is that of a frozen factor."""
    return key.endswith(tuple(f".nora_{factor}" for factor in FROZEN))


def is_token(key: str) -> bool:
    """Whether a key is that of a new token's vectors."""
    return key.startswith("tokens.")


def count_parameters(info: AdapterInfo, sizes: Mapping[str, int]) -> None:
    """Set ``stored_parameters`` and ``trained_parameters`` from the size of each tensor."""
    info.stored_parameters = sum(sizes.values())
    info.trained_parameters = sum(n for key, n in sizes.items() if not is_frozen(key))
