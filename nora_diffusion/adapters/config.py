"""The adapter config: one dataclass whose fields are the axes of the design space."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from peft import PeftConfig
from torch import Tensor

from ..errors import UserError
from .axes import Basis, BasisDtype, CoreKind, ExpertKind, Factor, Placement, Router, has_inner_rank
from .deltas.bases import COMPUTED, Pair
from .patterns import check_patterns, suffix_matcher
from .peft_names import NORA
from .targets import expand_targets

TRAINED: dict[CoreKind, tuple[Factor, ...]] = {
    "none": ("down", "up"),
    "input": ("core", "up"),
    "nested": ("core",),
    "dense": ("core",),
    "diagonal": ("core",),
}
"""What each core trains unless told otherwise."""


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
class AdapterConfig(PeftConfig):
    """One adapter: its target modules, its outer basis, and which factors are trained. Made by the presets.

    ``alpha=None`` means ``alpha = r``. An empty ``trained`` means :data:`TRAINED` of the core.
    ``inner_r`` is the rank ``r'`` of a nested or input core, or of each projected expert; 1 elsewhere. ``blocks`` > 1
    makes the outer pair block-diagonal, ``rank_mask`` samples the rank while training, ``magnitude`` adds DoRA's
    trained row norms. ``modules_to_save``: modules that are trained as a whole, with PEFT's own
    functions only. Raises :class:`UserError` for a value outside its range.
    """

    method: str = "nora"
    r: int = 32
    alpha: float | None = None
    basis: Basis = "awsvd"
    placement: Placement = "sqrt"
    power: float = 0.5
    core: CoreKind = "nested"
    inner_r: int = 4
    trained: list[Factor] = field(default_factory=list)
    blocks: int = 1
    rank_mask: bool = False
    magnitude: bool = False
    router: Router = "none"
    num_experts: int = 1
    experts: ExpertKind = "shared"
    dropout: float = 0.0
    basis_dtype: BasisDtype = "float16"
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    start: Start = field(default_factory=Start, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = NORA
        self.target_modules = expand_targets(self.target_modules)
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]
        if not self.has_inner_rank:
            self.inner_r = 1
        if not self.trained:
            self.trained = list(TRAINED[self.core])
        if isinstance(self.start, dict):  # a config that was rebuilt from JSON
            self.start = Start()
        self._check()

    def _check(self) -> None:
        for name in ("r", "inner_r", "num_experts", "blocks"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name}={value!r} is not a rank or a count: give a whole number of at least 1")
        if self.has_inner_rank and self.inner_r > self.r and self.stored_outer:
            raise UserError(f"inner_r={self.inner_r} exceeds r={self.r}: the inner pair sits inside the outer one")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must be at least 0 and below 1")
        self._check_choice("basis", get_args(Basis))
        self._check_choice("placement", get_args(Placement))
        self._check_choice("core", get_args(CoreKind))
        self._check_choice("router", get_args(Router))
        self._check_choice("experts", get_args(ExpertKind))
        self._check_choice("basis_dtype", get_args(BasisDtype))
        if self.router != "none" and self.core != "none":
            raise UserError(f"router={self.router!r} needs core='none': experts share plain factors")
        if self.router != "none" and (self.blocks > 1 or self.rank_mask or self.magnitude):
            raise UserError(f"router={self.router!r} does not go with blocks, rank_mask or magnitude: leave them out")
        if self.router == "none" and self.num_experts > 1:
            raise UserError(f"num_experts={self.num_experts} needs a router: choose what the gate looks at")
        if self.router != "none" and set(self.trained) != {"down", "up"}:
            raise UserError(f"trained={self.trained} with router={self.router!r}: a mixture trains both down and up")
        if self.experts != "shared" and (self.router == "none" or self.basis != "kaiming"):
            raise UserError(f"experts={self.experts!r} needs a router and basis='kaiming': experts start at random")
        if self.core == "input" and self.blocks > 1:
            raise UserError("core='input' does not go with blocks: leave one of them out")
        saved = [] if self.modules_to_save is None else self.modules_to_save
        if not isinstance(saved, list | tuple | set) or not all(isinstance(name, str) and name for name in saved):
            raise UserError(f"modules_to_save={saved!r} is not a list of module names: give names such as ['conv_in']")
        self._check_scale()
        self._check_trained()
        check_patterns("target_modules", self.target_modules)
        check_patterns("exclude_modules", self.exclude_modules)
        check_patterns("rank_pattern", self.rank_pattern)
        check_patterns("alpha_pattern", self.alpha_pattern)

    def _check_scale(self) -> None:
        for name, value in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if value is not None and not (_is_finite(value) and value > 0):
                raise UserError(f"alpha={value!r} of {name!r} must be above 0: it scales the update")
        if not _is_finite(self.power):
            raise UserError(
                f"power={self.power!r} is not finite: it is the exponent of activation strengths, 0.5 by default"
            )
        for name, rank in self.rank_pattern.items():
            if not isinstance(rank, int) or rank < 1:
                raise UserError(f"rank {rank!r} of {name!r} is not a rank: give a whole number of at least 1")

    def _check_trained(self) -> None:
        for factor in self.trained:
            if factor not in get_args(Factor):
                raise UserError(f"trained={factor!r} is unknown: choose among {', '.join(get_args(Factor))}")
        # The factor that starts at zero must be trained, or nothing is.
        needed = "core" if self.starts_at_core else "up"
        if needed not in self.trained or (self.core == "none" and "core" in self.trained):
            raise UserError(f"trained={self.trained} with core={self.core!r} never learns: {needed!r} must be in it")
        if self.basis in COMPUTED and (self.core == "none" or set(self.trained) != {"core"}):
            raise UserError(f"basis={self.basis!r} is fixed: it needs a core, and only that can be trained")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise UserError(f"{name}={value!r} is unknown: choose one of {', '.join(choices)}")

    def rank_for(self, key: str) -> int:
        """The outer rank of the module at path ``key``, after ``rank_pattern``."""
        pattern = _pattern(self.rank_pattern, key)
        return self.r if pattern is None else self.rank_pattern[pattern]

    def scale_for(self, key: str) -> float:
        """``alpha / r`` of the module at path ``key``, after both patterns."""
        rank = self.rank_for(key)
        pattern = _pattern(self.alpha_pattern, key)
        alpha = self.alpha if pattern is None else self.alpha_pattern[pattern]
        return 1.0 if alpha is None else alpha / rank

    def to_dict(self) -> dict[str, Any]:
        """All fields that describe the adapter, ready for JSON: without ``start`` and unused ``modules_to_save``."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "start"}
        if not self.modules_to_save:
            del values["modules_to_save"]
        return values | {"peft_type": str(self.peft_type)}

    @property
    def has_inner_rank(self) -> bool:
        """Whether ``inner_r`` means something: a nested or input core, or projected experts."""
        return has_inner_rank(self.core, self.experts)

    @property
    def middle_rank(self) -> int:
        """The rank at the narrowest point of the chain."""
        return self.inner_r if self.has_inner_rank else self.r

    @property
    def starts_at_core(self) -> bool:
        """Whether the core is the factor that starts at zero; without one, and with an input core, it is ``up``."""
        return self.core not in ("none", "input")

    @property
    def stored_outer(self) -> bool:
        """Whether files hold the outer pair; otherwise it follows from shapes alone."""
        return self.basis not in COMPUTED

    @property
    def frozen_outer(self) -> bool:
        """Whether files hold frozen outer factors, which subjects can share."""
        return self.stored_outer and not {"down", "up"} <= set(self.trained)


def _pattern(patterns: dict[str, Any], key: str) -> str | None:
    return next((pattern for pattern in patterns if fits(pattern, key)), None)


def fits(pattern: str, key: str) -> bool:
    """Whether a key of ``rank_pattern`` or ``alpha_pattern`` matches the module at path ``key``."""
    # Releases of transformers differ in whether CLIP's layers lie in a text_model: patterns match both.
    return bool(suffix_matcher(pattern.removeprefix("text_model.")).match(key.removeprefix("text_model.")))


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
