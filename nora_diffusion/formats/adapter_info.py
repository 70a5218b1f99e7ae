"""The metadata of an adapter file, :class:`AdapterInfo`: written, and read with every value checked."""

from __future__ import annotations

import functools
import json
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from ..adapters.axes import LARGEST, Axes, axis_types, has_inner_rank
from ..errors import UserError
from ..io.untrusted import conform, parse_json
from ..pipelines.names import COMPONENTS

if TYPE_CHECKING:
    from ..adapters import AdapterConfig

FORMAT = "nora_adapter"
FORMAT_VERSION = 2
"""Newest version that this release writes and reads. Files without new tokens have version 1."""
ENCODERS = {name for name in COMPONENTS if name.startswith("text_encoder")}
WORD = re.compile(r"[^\s,;:()\[\]{}]{2,50}")
"""A new token: no white space, no punctuation that separates words or that other tools use for prompt weights."""
MAX_VECTORS = 64
"""Upper bound for the vectors of a new token."""
BasisKind = Literal["own", "shared"]


@dataclass
class AdapterInfo:
    """Metadata of an adapter file.

    ``kind`` is ``"nora"``, or the format of another tool's file, and ``note`` describes such a file. ``conv_shapes``:
    ``[c, kh, kw]`` of each adapted convolution. ``shapes``: ``[d_out, d_in]`` of each projection whose outer factors
    are not stored, because they are determined by its shape. ``tokens``: the adapter's new tokens, each with the text
    encoders that learned it.
    """

    components: dict[str, dict[str, Any]]
    base: str = ""
    base_fingerprint: dict[str, dict[str, float]] = field(default_factory=dict)
    basis: BasisKind = "own"
    basis_sha256: str = ""
    conv_shapes: dict[str, list[int]] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    tokens: dict[str, list[str]] = field(default_factory=dict)
    trigger: str = ""
    class_word: str = ""
    instance_prompt: str = ""
    prompts: list[str] = field(default_factory=list)
    step: int = 0
    seed: int | None = None
    license: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    format_version: int = 1
    # Not stored, set when a file is read:
    path: str = ""
    sha256: str = ""
    bytes: int = 0
    trained_parameters: int = 0
    stored_parameters: int = 0
    kind: str = "nora"
    note: str = ""

    @property
    def configs(self) -> dict[str, AdapterConfig]:
        """The config of each component. Raises :class:`UserError` for a file of another tool."""
        from ..adapters import AdapterConfig  # late: it imports torch and peft

        return {name: AdapterConfig(**vars(axes)) for name, axes in self.axes.items()}

    @property
    def axes(self) -> dict[str, Axes]:
        """The axes of each component. Raises :class:`UserError` for a file of another tool."""
        if not self.is_ours:
            raise UserError(
                f"{self.path} is {self.note}: load it with load_adapter, or convert a LoRA to an adapter of this "
                "toolkit with `nora-diffusion import`"
            )
        return {name: Axes(**_axes(values)) for name, values in self.components.items()}

    @property
    def fingerprints(self) -> dict[tuple[str, str], float]:
        """The base's fingerprint of each projection, by component and path."""
        return {(component, path): f for component, own in self.base_fingerprint.items() for path, f in own.items()}

    @property
    def method(self) -> str:
        """The preset's name: ``nora``, ``mor`` ..."""
        return str(self._first["method"])

    @property
    def is_ours(self) -> bool:
        """Whether the file is in this toolkit's format; otherwise ``kind`` names another tool's."""
        return self.kind == "nora"

    @property
    def r(self) -> int:
        """The outer rank."""
        return int(self._first["r"])

    @property
    def inner_r(self) -> int:
        """The inner rank (1 if the method has none); some layers may have another one."""
        return int(self._first["inner_r"])

    @property
    def ranks(self) -> str:
        """The ranks as text, ``r = 32, r' = 4``; the inner one only if the method has one.

        ``r' = 1 to 12 by layer`` if it differs.
        """
        outer = _span(self.r, self._first.get("rank_pattern", {}))
        if not has_inner_rank(self._first.get("core"), self._first.get("experts")):
            return f"r = {outer}"
        return f"r = {outer}, r' = {_span(self.inner_r, self._first.get('inner_rank_pattern', {}))}"

    @property
    def trained_numbers(self) -> int:
        """Deprecated: use ``trained_parameters``."""
        return self._renamed("trained_numbers", "trained_parameters")

    @property
    def stored_numbers(self) -> int:
        """Deprecated: use ``stored_parameters``."""
        return self._renamed("stored_numbers", "stored_parameters")

    def _renamed(self, old: str, new: str) -> int:
        warnings.warn(f"AdapterInfo.{old} is deprecated: use {new}", DeprecationWarning, stacklevel=3)
        return int(getattr(self, new))

    @property
    def _first(self) -> dict[str, Any]:
        return next(iter(self.components.values()))


def _span(rank: int, pattern: dict[str, int]) -> str:
    low, high = min([rank, *pattern.values()]), max([rank, *pattern.values()])
    return f"{low} to {high} by layer" if low < high else str(rank)


READ_ONLY = ("path", "sha256", "bytes", "trained_parameters", "stored_parameters", "kind", "note")
DESCRIPTIVE = ("trigger", "class_word", "instance_prompt", "prompts", "step", "seed", "license", "extra")
"""Fields that a caller of ``save_adapter`` may set; the others are derived from the adapter."""

PEFT_FIELDS = {
    "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type", "inference_mode",
}  # fmt: skip
"""Fields that PEFT adds to every config; ignored on reading."""


def dump_info(info: AdapterInfo) -> str:
    """The metadata as JSON; equal adapters give equal text."""
    values = {k: v for k, v in asdict(info).items() if k not in READ_ONLY and v not in ("", [], {}, None)}
    return json.dumps({"format": FORMAT, **values}, separators=(",", ":"))


def parse_info(text: str, where: str) -> AdapterInfo:
    """Parse and check the JSON of :func:`dump_info`. Raises :class:`UserError` that names ``where`` and the error."""
    try:
        values = parse_json(text)
        version = int(values.get("format_version", 0))
        if version > FORMAT_VERSION:
            raise UserError(f"{where} has format version {version}, this release reads up to {FORMAT_VERSION}: upgrade")
        return info_from(values)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        if isinstance(error, UserError) and str(error).startswith(where):
            raise
        raise UserError(f"{where}: its metadata is damaged ({error}): copy it again") from error


def info_from(values: dict[str, Any]) -> AdapterInfo:
    """Build an :class:`AdapterInfo` from untrusted values. Raises ``ValueError`` for the first invalid one."""
    if values.get("format", FORMAT) != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    hints = _field_types()
    known = {f.name for f in fields(AdapterInfo)} - set(READ_ONLY)
    info = AdapterInfo(**{k: conform(v, hints[k], k, 2**64) for k, v in values.items() if k in known})
    checks: dict[str, Callable[[AdapterInfo], bool]] = {
        "components": lambda i: bool(i.components) and set(i.components) <= set(COMPONENTS),
        "base_fingerprint": lambda i: set(i.base_fingerprint) == set(i.components),
        "basis_sha256": lambda i: bool(re.fullmatch(r"[0-9a-f]{64}|", i.basis_sha256)),
        "conv_shapes": lambda i: all(len(s) == 3 and _is_small_shape(s) for s in i.conv_shapes.values()),
        "shapes": lambda i: all(len(s) == 2 and _is_small_shape(s) for s in i.shapes.values()),
        "tokens": lambda i: all(WORD.fullmatch(w) and p and set(p) <= ENCODERS for w, p in i.tokens.items()),
        "method": lambda i: all(re.fullmatch(r"\w{1,40}", str(c["method"])) for c in i.components.values()),
        "step": lambda i: i.step >= 0,
    }
    for name, is_valid in checks.items():
        if not is_valid(info):
            raise ValueError(f"{name} has an invalid value")
    info.components = {name: {**config, **_axes(config)} for name, config in info.components.items()}
    _ = info.axes
    return info


@functools.cache
def _field_types() -> dict[str, Any]:
    return get_type_hints(AdapterInfo)


def _is_small_shape(shape: list[int]) -> bool:
    return all(size > 0 for size in shape) and math.prod(shape) < 2**31


def _axes(values: dict[str, Any]) -> dict[str, Any]:
    """The axes of a config, type-checked. Refuses unknown axes: ignoring one would change the adapter's output."""
    types = axis_types()
    axes = types.keys() - {"modules_to_save"}
    unknown = values.keys() - axes - PEFT_FIELDS - {"start"}
    if unknown:
        raise ValueError(f"the axis {min(unknown)[:40]!r} is unknown to this release: upgrade")
    return {k: conform(v, types[k], k, LARGEST) for k, v in values.items() if k in axes}
