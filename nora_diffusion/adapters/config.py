"""The adapter config: the axes of an adapter as a config of PEFT."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from peft import PeftConfig
from torch import Tensor

from .axes import Axes
from .deltas.bases import Pair
from .peft_names import NORA

RARE: dict[str, Any] = {"modules_to_save": None, "inner_rank_pattern": {}, "rank_scales": "none", "top_k": 0}
"""Fields that are left out of files at this value, so that earlier releases can read these."""


@dataclass
class Start:
    """How a layer initializes its factors; never written to a file.

    ``strengths``: mean ``|x|`` per input channel, by module path. ``pairs``: outer pairs computed already, by module
    path. ``empty``: leave the factors uninitialized, because they are about to be read from a file (a basis is never
    recomputed on load). ``condition``: input width of a router other than ``token``.
    """

    strengths: dict[str, Tensor] = field(default_factory=dict)
    pairs: dict[str, Pair] = field(default_factory=dict)
    empty: bool = False
    condition: int = 0


@dataclass
class AdapterConfig(Axes, PeftConfig):
    """One adapter as PEFT takes it: :class:`.axes.Axes`, and how its layers start. Made by the presets."""

    start: Start = field(default_factory=Start, repr=False, compare=False)

    def __post_init__(self) -> None:
        PeftConfig.__post_init__(self)
        self.peft_type = NORA
        if isinstance(self.start, dict):  # a config that was rebuilt from JSON
            self.start = Start()
        Axes.__post_init__(self)

    def to_dict(self) -> dict[str, Any]:
        """All fields that describe the adapter, ready for JSON: without ``start`` and :data:`RARE` ones not in use."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "start"}
        values = {name: value for name, value in values.items() if name not in RARE or value != RARE[name]}
        return values | {"peft_type": str(self.peft_type)}
