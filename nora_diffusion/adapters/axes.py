"""The axes of the design space: the values of each, and an adapter as a point on them, with all checks.

Nothing here imports torch or peft, so that flags and files are checked at once.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from ..errors import UserError, quoted
from ..io.untrusted import conform
from .patterns import check_patterns, suffix_matcher
from .targets import expand_targets

Basis = Literal["svd", "awsvd", "learned", "kaiming", "orthogonal", "sharing"]
"""How the outer pair is made (:mod:`.deltas.bases`)."""
Placement = Literal["up", "down", "sqrt", "none"]
"""Which outer factor gets the singular values."""
CoreKind = Literal["none", "diagonal", "dense", "nested", "input"]
"""What lies between the outer factors (:mod:`.deltas.cores`)."""
Factor = Literal["down", "core", "up"]
RouterInput = Literal["token", "prompt", "timestep", "prompt+timestep"]
OutputRouter = Literal["outputs", "pooled_outputs"]
"""What the gates of frozen experts read (:mod:`.deltas.gated`)."""
Router = Literal["none", RouterInput, OutputRouter]
ExpertKind = Literal["shared", "independent", "projected", "modules", "frozen"]
"""What the experts of a router share (:mod:`.deltas.routed`)."""
RankScales = Literal["none", "linear", "softmax"]
"""The trained scale of each rank at the narrowest point of a chain (:func:`.deltas.chain.rank_weights`)."""
BasisDtype = Literal["float32", "float16", "bfloat16"]
Targets = str | list[str] | None
FROM_WEIGHTS = frozenset({"svd", "awsvd"})
"""Bases that depend on the base model only: computed and stored once for all subjects."""
COMPUTED = frozenset({"sharing"})
"""Bases that depend on shapes only: files do not store them."""
MAX_WEIGHT = 100.0
"""Bound for the weight of an adapter: larger ones give noise, and soon NaN."""


def has_inner_rank(core: object, experts: object) -> bool:
    """Whether ``inner_r`` means something: a nested or input core, or projected experts."""
    return core in ("nested", "input") or experts == "projected"


TRAINED: dict[CoreKind, tuple[Factor, ...]] = {
    "none": ("down", "up"),
    "input": ("core", "up"),
    "nested": ("core",),
    "dense": ("core",),
    "diagonal": ("core",),
}
"""What each core trains unless told otherwise."""

LARGEST = 2**16
"""Upper bound for ranks, counts and scales; checked before anything is allocated."""
SMALLEST_ALPHA, MAX_POWER = 1e-30, 10
_COUNT = f"a whole number from 1 to {LARGEST}"
_NUMBER, _SWITCH = f"a finite number of at most {LARGEST}", "True or False"
_NAMES = "a group such as 'attn', a list of names or a regular expression"
_KINDS = {
    "method": "the name of a method",
    "r": _COUNT, "inner_r": _COUNT, "num_experts": _COUNT, "blocks": _COUNT, "top_k": _COUNT + ", or 0 for all",
    "alpha": f"{_NUMBER}, or None", "power": _NUMBER, "dropout": "a number from 0 to below 1",
    "trained": "a list of factors", "rank_mask": _SWITCH, "magnitude": _SWITCH,
    "target_modules": _NAMES, "exclude_modules": _NAMES, "modules_to_save": "a list of module names",
    "rank_pattern": "a dict of names and ranks", "alpha_pattern": "a dict of names and alphas",
    "inner_rank_pattern": "a dict of names and ranks",
}  # fmt: skip
"""What the fields must be, apart from those with a choice of names."""
_CHOICES: dict[str, Any] = {
    "basis": Basis, "placement": Placement, "core": CoreKind, "router": Router, "experts": ExpertKind,
    "rank_scales": RankScales, "basis_dtype": BasisDtype,
}  # fmt: skip


@dataclass
class Axes:
    """One adapter: its target modules, its outer basis, and which factors are trained.

    ``alpha=None`` means ``alpha = r``. An empty ``trained`` means :data:`TRAINED` of the core.
    ``inner_r`` is the rank ``r'`` of a nested or input core, or of each projected expert; 1 elsewhere.
    ``inner_rank_pattern`` gives some layers another one, as ``rank_pattern`` does with ``r``; no layer's exceeds its
    outer rank. ``blocks`` > 1 makes the outer pair block-diagonal, ``rank_mask`` samples the rank while training,
    ``magnitude`` adds DoRA's trained row norms, ``rank_scales`` a trained scale of each rank. A gate uses
    the ``top_k`` largest of its experts, or all for 0. ``modules_to_save``:
    modules that are trained as a whole, with PEFT's own functions only. Raises :class:`UserError` for a value outside
    its range.
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
    inner_rank_pattern: dict[str, int] = field(default_factory=dict)
    rank_scales: RankScales = "none"
    top_k: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        self.target_modules = expand_targets(self.target_modules)
        if not self.has_inner_rank:
            self.inner_r = 1
        if not self.trained and self.experts != "frozen":
            self.trained = list(TRAINED[self.core])
        self._check()

    def _check_types(self) -> None:
        """Check each value against the type of its field, after numbers of NumPy and torch became Python's own."""
        hints = axis_types() | {"trained": list[str]}
        for name in axis_types():
            value = _plain(getattr(self, name))
            value = [value] if name == "modules_to_save" and isinstance(value, str) else value
            setattr(self, name, value)
            if name in _CHOICES:
                self._check_choice(name, get_args(_CHOICES[name]))
            elif name in _KINDS and not (name == "trained" and value is None):
                try:
                    conform(value, hints[name], name, LARGEST)
                except ValueError:
                    raise UserError(f"{name}={quoted(value)} is not allowed: give {_KINDS[name]}") from None

    def _check(self) -> None:
        if "" in (self.modules_to_save or []):
            raise UserError(f"modules_to_save={self.modules_to_save} has an empty name")
        for name in ("r", "inner_r", "num_experts", "blocks"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} is not a rank or a count: give {_COUNT}")
        if self.has_inner_rank and self.inner_r > self.r and self.stored_outer:
            raise UserError(f"inner_r={self.inner_r} exceeds r={self.r}: the inner pair sits inside the outer one")
        if self.inner_rank_pattern and not self.has_inner_rank:
            raise UserError(f"inner_rank_pattern needs an inner rank, which core={self.core!r} does not have")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.router != "none" and self.core != "none":
            raise UserError(f"router={self.router!r} needs core='none': experts share plain factors")
        if self.router != "none" and (self.blocks > 1 or self.rank_mask or self.magnitude):
            raise UserError(f"router={self.router!r} does not go with blocks, rank_mask or magnitude: leave them out")
        if self.router == "none" and self.num_experts > 1:
            raise UserError(f"num_experts={self.num_experts} needs a router: choose what the gate looks at")
        if self.router != "none" and set(self.trained) != {"down", "up"} and self.experts != "frozen":
            raise UserError(f"trained={self.trained} with router={self.router!r}: a mixture trains both down and up")
        if self.experts != "shared" and (self.router == "none" or self.basis != "kaiming"):
            raise UserError(f"experts={self.experts!r} needs a router and basis='kaiming': experts start at random")
        self._check_modules()
        if self.rank_scales != "none" and (self.router != "none" or self.core in ("dense", "diagonal")):
            raise UserError(
                f"rank_scales={self.rank_scales!r} scales the ranks between two factors: it needs router='none' and no "
                f"core or a nested one, not core={self.core!r}"
            )
        if self.core == "input" and self.blocks > 1:
            raise UserError("core='input' does not go with blocks: leave one of them out")
        self._check_scale()
        self._check_trained()
        check_patterns("target_modules", self.target_modules)
        check_patterns("exclude_modules", self.exclude_modules)
        check_patterns("rank_pattern", self.rank_pattern)
        check_patterns("alpha_pattern", self.alpha_pattern)
        check_patterns("inner_rank_pattern", self.inner_rank_pattern)

    def _check_modules(self) -> None:
        if (self.experts == "frozen") != (self.router in get_args(OutputRouter)) or (
            self.experts == "frozen" and self.trained
        ):
            raise UserError(
                f"experts={self.experts!r} with router={self.router!r} and trained={self.trained}: frozen experts have "
                f"a gate that reads their outputs, {' or '.join(get_args(OutputRouter))}, and nothing else is trained"
            )
        if self.experts == "modules" and (self.router in ("none", "token") or self.num_experts > 1):
            raise UserError(
                f"experts='modules' with router={self.router!r} and num_experts={self.num_experts}: the modules of a "
                "block are its experts, so they need a gate that all share: router='prompt', 'timestep' or "
                "'prompt+timestep', and num_experts=1"
            )
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} is no number of experts: give {_KINDS['top_k']}")
        if self.top_k and self.router in ("none", "token", *get_args(OutputRouter)):
            raise UserError(
                f"top_k={self.top_k} with router={self.router!r}: only the gates of a prompt or timestep can leave "
                "experts out"
            )
        if self.top_k > self.num_experts and self.experts != "modules":
            raise UserError(f"top_k={self.top_k} exceeds num_experts={self.num_experts}: give at most that many")

    def _check_scale(self) -> None:
        for name, value in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if value is not None and value < SMALLEST_ALPHA:
                raise UserError(f"alpha={value!r} of {name!r} must be above 0: it scales the update")
        if abs(self.power) > MAX_POWER:
            raise UserError(
                f"power={self.power} is out of range: it is the exponent of activation strengths, 0.5 by default, at "
                f"most {MAX_POWER} in magnitude"
            )
        for name, rank in (*self.rank_pattern.items(), *self.inner_rank_pattern.items()):
            if rank < 1:
                raise UserError(f"rank {rank!r} of {name!r} is not a rank: give {_COUNT}")

    def _check_trained(self) -> None:
        for factor in self.trained:
            if factor not in get_args(Factor):
                raise UserError(f"trained={quoted(factor)} is unknown: choose among {', '.join(get_args(Factor))}")
        if self.experts == "frozen":
            return
        # The factor that starts at zero must be trained, or nothing is.
        needed = "core" if self.starts_at_core else "up"
        if needed not in self.trained or (self.core == "none" and "core" in self.trained):
            raise UserError(f"trained={self.trained} with core={self.core!r} never learns: {needed!r} must be in it")
        if self.basis in COMPUTED and (self.core == "none" or set(self.trained) != {"core"}):
            raise UserError(f"basis={self.basis!r} is fixed: it needs a core, and only that can be trained")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) or value not in choices:
            raise UserError(f"{name}={quoted(value)} is unknown: choose one of {', '.join(choices)}")

    def selects(self, path: str) -> bool:
        """Whether the module at ``path`` is a target. Files are checked without PEFT, whose rule this is."""
        saved = any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in self.modules_to_save or [])
        return _names(self.target_modules, path) and not _names(self.exclude_modules, path) and not saved

    def rank_for(self, key: str) -> int:
        """The outer rank of the module at path ``key``, after ``rank_pattern``."""
        pattern = _pattern(self.rank_pattern, key)
        return self.r if pattern is None else self.rank_pattern[pattern]

    def inner_rank_for(self, key: str) -> int:
        """The inner rank of the module at path ``key``, after ``inner_rank_pattern``; 1 without one."""
        pattern = _pattern(self.inner_rank_pattern, key)
        return self.inner_r if pattern is None else self.inner_rank_pattern[pattern]

    def scale_for(self, key: str) -> float:
        """``alpha / r`` of the module at path ``key``, after both patterns."""
        rank = self.rank_for(key)
        pattern = _pattern(self.alpha_pattern, key)
        alpha = self.alpha if pattern is None else self.alpha_pattern[pattern]
        return 1.0 if alpha is None else alpha / rank

    @property
    def has_inner_rank(self) -> bool:
        """Whether ``inner_r`` means something: a nested or input core, or projected experts."""
        return has_inner_rank(self.core, self.experts)

    @property
    def middle_rank(self) -> int:
        """The rank at the narrowest point of the chain, the largest of all layers."""
        return max([self.inner_r, *self.inner_rank_pattern.values()]) if self.has_inner_rank else self.r

    @property
    def trained_basis(self) -> list[Factor]:
        """The trained factors without an ``up`` that starts at zero beside an input core, and not from the basis."""
        return [factor for factor in self.trained if factor != "up" or self.core != "input"]

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


@functools.cache
def axis_types() -> dict[str, Any]:
    """The type of each axis, in the order of the fields."""
    return get_type_hints(Axes)


def _names(targets: str | list[str] | None, path: str) -> bool:
    """Whether a pattern matches a path, or a list has its name or the end of it."""
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, path))
    return any(f".{path}".endswith(f".{name}") for name in targets or [])


def _pattern(patterns: dict[str, Any], key: str) -> str | None:
    return next((pattern for pattern in patterns if fits(pattern, key)), None)


def fits(pattern: str, key: str) -> bool:
    """Whether a key of a table such as ``rank_pattern`` matches the module at path ``key``."""
    # Releases of transformers differ in whether CLIP's layers lie in a text_model: patterns match both.
    return bool(suffix_matcher(pattern.removeprefix("text_model.")).match(key.removeprefix("text_model.")))


def _plain(value: Any) -> Any:
    """Scalars of NumPy and torch as Python's own numbers, sets and tuples as lists; also inside lists and dicts."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value
