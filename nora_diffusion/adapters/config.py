"""The adapter config: one dataclass whose fields are the axes of the design space."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from peft import PeftConfig
from torch import Tensor

from ..errors import UserError
from .bases import BASES, PLACEMENTS, Basis, Pair, Placement

CoreKind = Literal["none", "dense", "nested"]
Router = Literal["none", "token"]
BasisDtype = Literal["float32", "float16", "bfloat16"]
PEFT_TYPE_NAME = "NORA"

TARGET_GROUPS: dict[str, tuple[str, ...]] = {
    "attn": ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"),
    "ff": ("ff.net.0.proj", "ff.net.2", "fc1", "fc2"),
    "proj": ("proj_in", "proj_out"),
    "conv": ("conv1", "conv2", "conv_shortcut"),
}
"""Names of module groups that ``target_modules`` understands beside suffixes and regular expressions."""


def expand_targets(targets: str | list[str] | tuple[str, ...] | None) -> str | list[str]:
    """Replace group names by the suffixes they stand for; a string that is no group is a regular expression."""
    if targets is None:
        return list(TARGET_GROUPS["attn"])
    if isinstance(targets, str):
        if targets not in TARGET_GROUPS:
            return targets
        targets = [targets]
    suffixes = [suffix for target in targets for suffix in TARGET_GROUPS.get(target, (target,))]
    return list(dict.fromkeys(suffixes))


@dataclass
class Start:
    """How a layer gets its first numbers; never written to a file.

    ``strengths``: mean ``|x|`` per input channel, by module path. ``pairs``: outer pairs that are at hand already, by
    module path. ``empty``: leave the factors unset, because they are about to be read from a file (a basis is never
    recomputed on load).
    """

    strengths: dict[str, Tensor] = field(default_factory=dict)
    pairs: dict[str, Pair] = field(default_factory=dict)
    empty: bool = False


@dataclass
class AdapterConfig(PeftConfig):
    """One adapter: where it sits, which subspaces it moves in, what of it is trained. Made by the presets.

    Raises :class:`UserError` for a value outside its range. ``alpha=None`` means ``alpha = r``.
    """

    method: str = "nora"
    r: int = 32
    alpha: float | None = None
    basis: Basis = "awsvd"
    placement: Placement = "sqrt"
    power: float = 0.5
    core: CoreKind = "nested"
    inner_r: int = 4
    router: Router = "none"
    num_experts: int = 1
    dropout: float = 0.0
    basis_dtype: BasisDtype = "float16"
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    start: Start = field(default_factory=Start, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        from .register import NORA

        self.peft_type = NORA
        self.target_modules = expand_targets(self.target_modules)
        if isinstance(self.start, dict):  # a config that was rebuilt from JSON
            self.start = Start()
        self._check()

    def _check(self) -> None:
        for name in ("r", "inner_r", "num_experts"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name}={value!r} is no rank or count: give a whole number of at least 1")
        if self.core == "nested" and self.inner_r > self.r:
            raise UserError(f"inner_r={self.inner_r} exceeds r={self.r}: the inner pair sits inside the outer one")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must be at least 0 and below 1")
        self._check_choice("basis", tuple(BASES))
        self._check_choice("placement", PLACEMENTS)
        self._check_choice("core", ("none", "dense", "nested"))
        self._check_choice("router", ("none", "token"))
        self._check_choice("basis_dtype", ("float32", "float16", "bfloat16"))
        if self.router != "none" and self.core != "none":
            raise UserError(f"router={self.router!r} needs core='none': experts share plain factors")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise UserError(f"{name}={value!r} is unknown: choose one of {', '.join(choices)}")

    def rank_for(self, key: str) -> int:
        """The outer rank of the module at path ``key``, after ``rank_pattern``."""
        return self.rank_pattern.get(_pattern(self.rank_pattern, key), self.r)

    def scale_for(self, key: str) -> float:
        """``alpha / r`` of the module at path ``key``, after both patterns."""
        rank = self.rank_for(key)
        alpha = self.alpha_pattern.get(_pattern(self.alpha_pattern, key), self.alpha)
        return 1.0 if alpha is None else alpha / rank

    def to_dict(self) -> dict[str, Any]:
        """All fields that describe the adapter, ready for JSON (``start`` is not one of them)."""
        skip = {"start"}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skip}
        values["peft_type"] = str(PEFT_TYPE_NAME)
        return values

    @property
    def frozen_outer(self) -> bool:
        """Whether the outer pair is frozen (and so could be shared between subjects)."""
        return self.core != "none"


def _pattern(patterns: dict[str, Any], key: str) -> str:
    import re

    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", key)), "")
