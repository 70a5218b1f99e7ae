"""Adapter weights: on the denoiser, on the text encoders, and per block of a UNet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError
from ..generation.tags import check_range

BLOCKS = ("down", "mid", "up")
"""Blocks of a UNet with a weight of their own; their module paths start with ``<block>_block``."""


@dataclass(frozen=True)
class AdapterWeights:
    """``unet`` is the weight on the denoiser, ``te`` on text encoders; ``blocks`` multiply ``unet`` (default 1)."""

    unet: float = 1.0
    te: float | None = None
    blocks: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for weight in (self.unet, self.text, *self.blocks.values()):
            check_range(weight, "the weight sliders")
        unknown = set(self.blocks) - set(BLOCKS)
        if unknown:
            raise UserError(f"{sorted(unknown)[0]!r} is not a block: choose one of {', '.join(BLOCKS)}")

    @property
    def text(self) -> float:
        """The weight on text encoders."""
        return self.unet if self.te is None else self.te

    def at(self, component: str, path: str) -> float:
        """The weight of one module of a component."""
        if component.startswith("text_encoder"):
            return self.text
        block = next((name for name in BLOCKS if path.startswith(f"{name}_block")), "")
        return self.unet * self.blocks.get(block, 1.0)

    def settings(self) -> dict[str, Any]:
        """Weights that differ from ``unet``, for the settings of an image."""
        extra: dict[str, Any] = {} if self.text == self.unet else {"te": self.text}
        blocks = {name: value for name, value in self.blocks.items() if value != 1.0}
        return extra | ({"blocks": blocks} if blocks else {})


def set_weights(pipe: Any, weights: Mapping[str, AdapterWeights]) -> None:
    """Activate exactly these adapters, each with its weights."""
    from ..loaders import set_adapters  # late: it imports torch
    from ..pipelines.components import components

    set_adapters(pipe, list(weights), [w.unet for w in weights.values()])
    for component, module in components(pipe).items():
        for path, layer in module.named_modules():
            if hasattr(layer, "set_scale"):
                for name, weight in weights.items():
                    layer.set_scale(name, weight.at(component, path.removeprefix("text_model.")))
