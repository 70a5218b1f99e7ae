"""How strong an adapter acts: on the denoiser, on the text encoders, and by block of a UNet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError
from ..generation.tags import check_range
from ..loaders import set_adapters
from ..pipelines.components import components

BLOCKS = ("down", "mid", "up")
"""Parts of a UNet that may have a factor of their own; module paths begin with ``<block>_block``."""


@dataclass(frozen=True)
class AdapterWeights:
    """``unet`` acts on the denoiser, ``te`` on text encoders; ``blocks`` are factors on top, by block (default 1)."""

    unet: float = 1.0
    te: float | None = None
    blocks: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for weight in (self.unet, self.text, *self.blocks.values()):
            check_range(weight, "the mix")
        unknown = set(self.blocks) - set(BLOCKS)
        if unknown:
            raise UserError(f"{sorted(unknown)[0]!r} is no block: choose among {', '.join(BLOCKS)}")

    @property
    def text(self) -> float:
        """The weight on text encoders."""
        return self.unet if self.te is None else self.te

    def at(self, part: str, path: str) -> float:
        """The weight at one projection."""
        if part.startswith("text_encoder"):
            return self.text
        block = next((name for name in BLOCKS if path.startswith(f"{name}_block")), "")
        return self.unet * self.blocks.get(block, 1.0)

    def beyond_one_number(self) -> dict[str, Any]:
        """What a single weight does not say, for the settings of a picture."""
        extra: dict[str, Any] = {} if self.text == self.unet else {"te": self.text}
        factors = {name: value for name, value in self.blocks.items() if value != 1.0}
        return extra | ({"blocks": factors} if factors else {})


def set_weights(pipe: Any, weights: Mapping[str, AdapterWeights]) -> None:
    """Make exactly these adapters active, each with its weights."""
    set_adapters(pipe, list(weights), [w.unet for w in weights.values()])
    for part, module in components(pipe).items():
        for path, layer in module.named_modules():
            if hasattr(layer, "set_scale"):
                for name, weight in weights.items():
                    layer.set_scale(name, weight.at(part, path.removeprefix("text_model.")))
