"""Keys in an adapter file: ``<component>.<module path>.nora_<factor>`` and ``tokens.<number>.<text encoder>``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from ..adapters.shapes import FROZEN
from .adapter_info import AdapterInfo

T = TypeVar("T")

FROZEN_ENDINGS = tuple(f".nora_{factor}" for factor in FROZEN)
"""How the keys of frozen factors end."""

Projection = tuple[str, str]
"""Component and path of a projection: ``("unet", "mid_block.attentions.0...to_q")``."""


def file_key(component: str, path: str, factor: str) -> str:
    """The key of a factor, ``unet.<path>.nora_A_in``; of a factor inside the core, its last name (``core.A_in``)."""
    return f"{component}.{path}.nora_{factor.rpartition('.')[2]}"


def split_key(key: str) -> tuple[str, str, str] | None:
    """``(component, path, factor)`` of the key of a factor; ``None`` for any other key."""
    module, separator, factor = key.rpartition(".nora_")
    component, _, path = module.partition(".")
    return (component, path, factor) if separator and path else None


def factors_by_projection(tensors: Mapping[str, T]) -> dict[Projection, dict[str, T]]:
    """The factors of an adapter file by projection, without its tokens. Inverse of :func:`file_key`."""
    found: dict[Projection, dict[str, T]] = {}
    for key, value in tensors.items():
        if not is_token(key) and (parts := split_key(key)) is not None:
            component, path, factor = parts
            found.setdefault((component, path), {})[factor] = value
    return found


def is_frozen(key: str) -> bool:
    """Whether a key is that of a frozen factor."""
    return key.endswith(FROZEN_ENDINGS)


def frozen_factors(tensors: Mapping[str, T]) -> dict[str, T]:
    """The frozen factors among an adapter's tensors: its basis."""
    return {key: value for key, value in tensors.items() if is_frozen(key)}


def token_key(number: int, encoder: str) -> str:
    """The key of a new token's vectors for a text encoder. Tokens are numbered in the order of the metadata."""
    return f"tokens.{number}.{encoder}"


def token_vectors(tokens: Mapping[str, Sequence[str]], tensors: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """The vectors of the metadata's ``tokens`` by token and text encoder."""
    return {
        token: {encoder: tensors[token_key(number, encoder)] for encoder in encoders}
        for number, (token, encoders) in enumerate(tokens.items())
    }


def is_token(key: str) -> bool:
    """Whether a key is that of a new token's vectors."""
    return key.startswith("tokens.")


def count_parameters(info: AdapterInfo, sizes: Mapping[str, int]) -> None:
    """Set ``stored_parameters`` and ``trained_parameters`` from the size of each tensor."""
    info.stored_parameters = sum(sizes.values())
    info.trained_parameters = sum(n for key, n in sizes.items() if not is_frozen(key))
