"""The values of each axis. Nothing here imports torch or peft, so that ``--help`` knows them at once."""

from __future__ import annotations

from typing import Literal

Basis = Literal["svd", "awsvd", "kaiming", "orthogonal", "sharing"]
"""How the outer pair is made (:mod:`.deltas.bases`)."""
Placement = Literal["up", "down", "sqrt", "none"]
"""Which outer factor gets the singular values."""
CoreKind = Literal["none", "diagonal", "dense", "nested", "input"]
"""What lies between the outer factors (:mod:`.deltas.cores`)."""
Factor = Literal["down", "core", "up"]
RouterInput = Literal["token", "prompt", "timestep", "prompt+timestep"]
Router = Literal["none", RouterInput]
ExpertKind = Literal["shared", "independent", "projected"]
"""What the experts of a router share (:mod:`.deltas.routed`)."""
BasisDtype = Literal["float32", "float16", "bfloat16"]
Targets = str | list[str] | None
MAX_WEIGHT = 100.0
"""Bound for the weight of an adapter: larger ones give noise, and soon NaN."""


def has_inner_rank(core: object, experts: object) -> bool:
    """Whether ``inner_r`` means something: a nested or input core, or projected experts."""
    return core in ("nested", "input") or experts == "projected"
