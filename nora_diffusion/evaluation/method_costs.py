"""The size of each method on the attention of real UNets. Needs no torch: sizes follow from shapes."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..adapters.axes import FROM_WEIGHTS, Axes
from ..adapters.presets import PRESETS, default_axes
from ..adapters.shapes import FROZEN, Shape, factor_shapes, narrowest_rank
from ..errors import UserError
from ..io.tensor_file import READABLE
from ..reports.markdown import table


@dataclass(frozen=True)
class Layout:
    """The attention of a UNet: channels and transformer depth of each resolution, and the width of the prompt.

    ``middle``: the depth in the middle. Down blocks have two transformers, up blocks three.
    """

    title: str
    channels: tuple[int, ...]
    depths: tuple[int, ...]
    middle: int
    context: int

    def projections(self) -> dict[str, Shape]:
        """The size ``(d_out, d_in)`` of each attention projection by path, as diffusers names it."""
        levels = list(zip(self.channels, self.depths, strict=True))
        blocks = {"mid_block.attentions.0": (self.channels[-1], self.middle)}
        for side, count, order in (("down", 2, levels), ("up", 3, levels[::-1])):
            for number, level in enumerate(order):
                blocks |= {f"{side}_blocks.{number}.attentions.{n}": level for n in range(count)}
        return {
            f"{block}.transformer_blocks.{n}.{attention}.{name}": (width, source if name in ("to_k", "to_v") else width)
            for block, (width, depth) in blocks.items()
            for n in range(depth)
            for attention, source in (("attn1", width), ("attn2", self.context))
            for name in ("to_q", "to_k", "to_v", "to_out.0")
        }


LAYOUTS = {
    "sd15": Layout("SD 1.5", (320, 640, 1280, 1280), (1, 1, 1, 0), 1, 768),
    "sdxl": Layout("SDXL", (320, 640, 1280), (0, 2, 10), 10, 2048),
}
ITEMSIZE = {dtype.name: dtype.itemsize for dtype in READABLE.values()}


@dataclass
class Cost:
    """The size of an adapter: trained parameters, bytes of its tensors, and bytes that a shared basis saves.

    ``ranks``: those of its plain LoRA; empty if it cannot be exported as one.
    """

    trained: int = 0
    file_bytes: int = 0
    basis_bytes: int = 0
    ranks: frozenset[int] = frozenset()


def layout(name: str) -> dict[str, Shape]:
    """The projections of a layout. Raises :class:`UserError` for an unknown name."""
    if name not in LAYOUTS:
        raise UserError(f"layout {name!r} is unknown: choose one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name].projections()


def cost(axes: Axes, projections: Mapping[str, Shape], context: int = 0) -> Cost:
    """The size of an adapter on those of the ``projections`` that it targets: their ``(d_out, d_in)`` by path.

    Trained parameters count in fp32, frozen ones in ``basis_dtype``. ``context``: the width of the prompt, for routers.
    """
    total = Cost()
    for path, size in projections.items():
        if not axes.selects(path):
            continue
        factors = {name: math.prod(shape) for name, shape in factor_shapes(axes, size, None, path, context).items()}
        frozen = sum(count for name, count in factors.items() if name in FROZEN) * ITEMSIZE[axes.basis_dtype]
        trained = sum(count for name, count in factors.items() if name not in FROZEN)
        total.trained += trained
        total.basis_bytes += frozen
        total.file_bytes += frozen + 4 * trained
        if axes.router == "none":
            total.ranks |= {narrowest_rank(axes, size, path)}
    return total


def method_table(methods: Iterable[str] | None = None, layouts: Iterable[str] | None = None) -> str:
    """A Markdown table of methods at their presets' defaults, on the attention projections of ``layouts``."""
    chosen = list(methods or PRESETS)
    unknown = [name for name in chosen if name not in PRESETS]
    if unknown:
        raise UserError(f"method {unknown[0]!r} is unknown: choose one of {', '.join(PRESETS)}")
    models = {name: layout(name) for name in layouts or LAYOUTS}
    heads = [f"{what}, {LAYOUTS[name].title}" for name in models for what in ("trained", "file")]
    header = ["method", "what it computes", "defaults", *heads, "merges", "as a plain LoRA"]
    return table(header, [_row(name, models) for name in chosen])


def _row(name: str, models: Mapping[str, Mapping[str, Shape]]) -> list[str]:
    axes = default_axes(name)
    costs = [cost(axes, projections, LAYOUTS[model].context) for model, projections in models.items()]
    sizes = [text for c in costs for text in (f"{c.trained:,}", _size(c, axes))]
    ranks = frozenset().union(*(c.ranks for c in costs))
    title, formula, link = described(name)
    merges, exports = ("yes", f"exact, rank {_span(ranks)}") if ranks else ("no", 'only with `gate="mean"`')
    if axes.magnitude:
        exports += ", with magnitude"
    formula = formula.replace("|", r"\|")
    return [f"[{title}]({link}) `{name}`", f"`{formula}`", _defaults(axes), *sizes, merges, exports]


def described(name: str) -> tuple[str, str, str]:
    """``(title, formula, link)`` of a method, from its preset's docstring."""
    return parts_of(inspect.getdoc(PRESETS[name]) or "", name)


def parts_of(docstring: str, name: str) -> tuple[str, str, str]:
    """``(title, formula, link)`` of a docstring that begins with "Title: ``formula``" and has a link."""
    text = " ".join(docstring.split())
    head, link = re.match(r"(.+?): ``(.+?)``", text), re.search(r"https://\S+", text)
    assert head and link, f"the docstring of {name} begins with 'Title: ``formula``' and has a link"
    return head[1], head[2], link[0]


def _defaults(axes: Axes) -> str:
    values = {"r": axes.r}
    if axes.has_inner_rank:
        values["r'"] = axes.inner_r
    if axes.router != "none" and axes.experts != "modules":
        values["N"] = axes.num_experts
    if axes.top_k:
        values["k"] = axes.top_k
    if axes.blocks > 1:
        values["n"] = axes.blocks
    return ", ".join(f"{name} = {value}" for name, value in values.items())


def _span(ranks: frozenset[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low} to {high}"


def _size(cost: Cost, axes: Axes) -> str:
    own, rest = (f"{size / 1e6:.2f} MB" for size in (cost.file_bytes, cost.file_bytes - cost.basis_bytes))
    return f"{own}, {rest} shared" if axes.basis in FROM_WEIGHTS else own
