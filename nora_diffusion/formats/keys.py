"""Keys of an adapter file, ``<component>.<module path>.nora_<factor>``: which kind of tensor each names."""

from __future__ import annotations

from collections.abc import Mapping

from .adapter_info import AdapterInfo

FROZEN = ("A_out", "B_out")
"""The frozen factors, which belong to the basis."""


def is_frozen(key: str) -> bool:
    """Whether a key names a frozen factor."""
    return key.endswith(tuple(f".nora_{factor}" for factor in FROZEN))


def is_token(key: str) -> bool:
    """Whether a key names the vectors of a new token."""
    return key.startswith("tokens.")


def count_parameters(info: AdapterInfo, sizes: Mapping[str, int]) -> None:
    """Set how many numbers a file stores and how many of them were trained, from the size of each tensor."""
    info.stored_parameters = sum(sizes.values())
    info.trained_parameters = sum(n for key, n in sizes.items() if not is_frozen(key))
