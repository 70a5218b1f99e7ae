"""The shapes of a projection's factors, from the axes and the shape of its weight: what a file holds. Needs no torch.

``size``: ``(d_out, d_in)`` of the weight as a matrix. ``key``: the path of the projection, for patterns and errors.
"""

from __future__ import annotations

import math

from ..errors import UserError
from .axes import Axes

Shape = tuple[int, ...]
FROZEN = ("A_out", "B_out")
"""Factors of the frozen basis."""


def outer_rank(axes: Axes, size: Shape, key: str) -> int:
    """The outer rank of a projection, at most its smaller side.

    For the ``sharing`` basis it is ``k = sqrt((d_in + d_out) r)``, so that the square core has as many parameters as a
    LoRA of rank ``r`` (MoRA, arXiv 2405.12130). Raises :class:`UserError` if ``blocks`` does not divide the projection.
    """
    d_out, d_in = size
    r = axes.rank_for(key)
    if axes.basis == "sharing":
        r = int(math.sqrt((d_in + d_out) * r) + 0.5)
    r = min(r, d_out, d_in)
    if any(side % axes.blocks for side in (r, d_out, d_in)):
        raise UserError(
            f"blocks={axes.blocks} does not divide {key!r}, which is {d_out} x {d_in} with rank {r}: choose a number "
            "that divides all three, or do not target this layer"
        )
    return r


def inner_rank(axes: Axes, r: int, key: str) -> int:
    """The inner rank ``r'`` of a projection of outer rank ``r``."""
    return min(axes.inner_rank_for(key), r)


def inner_rank_cost(axes: Axes, size: Shape, r: int) -> int:
    """The trained parameters of one inner rank: ``2 r`` of a nested core, ``r + d_out`` of an input core."""
    return r + (size[0] if axes.core == "input" else r)


def narrowest_rank(axes: Axes, size: Shape, key: str) -> int:
    """The rank at the narrowest point of the chain: ``r'`` where it means something, else ``r``."""
    r = outer_rank(axes, size, key)
    return inner_rank(axes, r, key) if axes.has_inner_rank else r


def outer_shapes(axes: Axes, size: Shape, r: int, key: str) -> tuple[Shape, Shape]:
    """The outer pair of a rank ``r``: ``[r, d_in / n]`` and ``[d_out, r / n]`` for ``n`` blocks."""
    n = axes.blocks
    return (r, size[1] // n), (size[0], inner_rank(axes, r, key) if axes.core == "input" else r // n)


def router_width(axes: Axes, size: Shape, kernel: Shape | None, key: str, condition: int) -> int:
    """The width of a router's input: ``d_in`` of a token router, else ``condition``, which its model gives.

    ``kernel``: ``(c, kh, kw)`` of a convolution. Raises :class:`UserError` for a token router on a wide convolution,
    or if the width is not known.
    """
    token = axes.router == "token"
    if token and kernel is not None and kernel[1:] != (1, 1):
        raise UserError(f"a token router cannot gate the {kernel[1:]} convolution {key!r}: do not target it")
    width = size[1] if token else condition
    if not width:
        raise UserError(f"router={axes.router!r} reads the model's inputs: use nora_diffusion.add_adapter")
    return width


def factor_shapes(axes: Axes, size: Shape, kernel: Shape | None, key: str, condition: int) -> dict[str, Shape]:
    """The shape of each factor of a projection that a file holds; the other parameters as in :func:`router_width`."""
    r = outer_rank(axes, size, key)
    if axes.router != "none":
        frozen = axes.experts == "frozen"
        width = axes.num_experts * r if frozen else router_width(axes, size, kernel, key, condition)
        return {**_expert_shapes(axes, size, r, key), "W_g": (axes.num_experts, width)}
    down, up = outer_shapes(axes, size, r, key)
    names = ("A" if "down" in axes.trained else FROZEN[0], "B" if "up" in axes.trained else FROZEN[1])
    outer = dict(zip(names, (down, up), strict=True)) if axes.stored_outer else {}
    scales = {} if axes.rank_scales == "none" else {"l": (narrowest_rank(axes, size, key),)}
    return {**outer, **_core_shapes(axes, r, key), **scales, **({"m": (size[0],)} if axes.magnitude else {})}


def _core_shapes(axes: Axes, r: int, key: str) -> dict[str, Shape]:
    inner = inner_rank(axes, r, key)
    shapes: dict[str, dict[str, Shape]] = {
        "none": {},
        "nested": {"A_in": (inner, r), "B_in": (r, inner)},
        "input": {"A_in": (inner, r)},
        "dense": {"R": (r, r)},
        "diagonal": {"d": (r,)},
    }
    return shapes[axes.core]


def _expert_shapes(axes: Axes, size: Shape, r: int, key: str) -> dict[str, Shape]:
    (d_out, d_in), n, inner = size, axes.num_experts, inner_rank(axes, r, key)
    shapes: dict[str, dict[str, Shape]] = {
        "shared": {"A": (r, d_in), "B": (d_out, r), "a": (n, r), "b": (n, d_out)},
        "independent": {"A": (n * r, d_in), "B": (d_out, n * r)},
        "frozen": {"A_out": (n * r, d_in), "B_out": (d_out, n * r)},
        "modules": {"A": (r, d_in), "B": (d_out, r)},
        "projected": {"A": (r, d_in), "P": (n, inner, r), "B": (d_out, n * inner)},
    }
    return shapes[axes.experts]
