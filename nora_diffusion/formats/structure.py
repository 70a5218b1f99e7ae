"""Compares an adapter's tensors with its own metadata, without its base: the same names and the same shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..adapters.axes import Axes
from ..adapters.shapes import Shape, factor_shapes
from ..errors import UserError
from .adapter_info import ENCODERS, MAX_VECTORS, AdapterInfo
from .keys import Projection, file_key, is_token, split_key, token_key

Shapes = Mapping[str, Shape]
"""Shapes of tensors by name."""


def check_structure(info: AdapterInfo, shapes: Shapes) -> None:
    """Raise :class:`UserError` unless the tensors in a file (and its basis) are exactly those of its metadata.

    ``shapes``: by file key. Whether they also fit a pipeline is checked by ``load_adapter``.
    """
    found: dict[Projection, dict[str, Shape]] = {}
    for key, shape in shapes.items():
        if is_token(key):
            continue
        if (parts := split_key(key)) is None:
            raise _mismatch(info, key, shape, None)
        component, path, factor = parts
        found.setdefault((component, path), {})[factor] = shape
    expected = _token_shapes(info, shapes)
    known: dict[tuple[object, ...], dict[str, Shape]] = {}  # most projections of a model are alike
    for component, axes in info.axes.items():
        paths = info.base_fingerprint[component]
        if not paths:
            raise UserError(f"{info.path} adapts no projection of the {component}: copy it again")
        for path in paths:
            if not _is_target(axes, component, path):
                raise UserError(f"{info.path} adapts {path}, which is not one of its target modules: copy it again")
            factors = found.get((component, path), {})
            size, kernel = _size(info, axes, f"{component}.{path}", factors)
            gate = factors.get("W_g", ())
            condition = gate[1] if len(gate) == 2 else 0
            same = component, size, kernel, condition, axes.rank_for(path), axes.inner_rank_for(path)
            if same not in known:
                try:
                    known[same] = factor_shapes(axes, size, kernel, path, condition)
                except UserError as error:
                    raise UserError(f"{info.path}: {error}") from error
            expected |= {file_key(component, path, factor): shape for factor, shape in known[same].items()}
    require_equal(info, shapes, expected)


def require_equal(info: AdapterInfo, found: Shapes, expected: Shapes) -> None:
    """Raise :class:`UserError` for the first tensor that is missing, unexpected or of another shape."""
    for key in sorted(found.keys() | expected.keys()):
        if found.get(key) != expected.get(key):
            raise _mismatch(info, key, found.get(key), expected.get(key))


def _size(
    info: AdapterInfo, axes: Axes, full: str, factors: Mapping[str, Shape]
) -> tuple[tuple[int, int], Shape | None]:
    """``(d_out, d_in)`` that the outer factors, or else the metadata, state for a projection; its kernel ``(c, h, w)``.

    The kernel is that of a convolution.
    """
    down, up = factors.get("A", factors.get("A_out", ())), factors.get("B", factors.get("B_out", ()))
    stated = info.shapes.get(full)
    if len(down) == len(up) == 2:
        size = (up[0], down[1] * axes.blocks)
        if stated not in (None, list(size)):
            raise UserError(f"{info.path} states the shape {stated} for {full}, but its factors are for {list(size)}")
    elif not down and not up and stated is not None:
        size = (stated[0], stated[1])
    else:
        raise UserError(f"{info.path} has neither the shape nor the outer factors of {full}: copy it again")
    if not all(size):
        raise UserError(f"{info.path}: the factors of {full} are empty: copy it again")
    kernel = info.conv_shapes.get(full)
    if kernel is not None and math.prod(kernel) != size[1]:
        raise UserError(f"{info.path} states the kernel {kernel} for {full}, whose factors have {size[1]} inputs")
    return size, None if kernel is None else tuple(kernel)


def _is_target(axes: Axes, component: str, path: str) -> bool:
    """Whether the axes select a path; text encoders may have it below ``text_model``."""
    paths = (path, f"text_model.{path}") if component in ENCODERS else (path,)
    return any(axes.selects(name) for name in paths)


def _token_shapes(info: AdapterInfo, shapes: Shapes) -> dict[str, Shape]:
    """The stated tokens' tensors ``[n, width]``: any width, and the same ``n`` in every text encoder."""
    expected: dict[str, Shape] = {}
    for number, (token, encoders) in enumerate(info.tokens.items()):
        keys = [token_key(number, encoder) for encoder in encoders]
        counts = {shapes[key][0] for key in keys if len(shapes.get(key, ())) == 2}
        if len(counts) > 1 or not all(1 <= count <= MAX_VECTORS for count in counts):
            raise UserError(
                f"{info.path}: its new token {token!r} must have 1 to {MAX_VECTORS} vectors, the same number in each "
                "text encoder"
            )
        expected |= {key: shapes[key] if len(shapes.get(key, ())) == 2 else (1, 1) for key in keys}
    return expected


def _mismatch(info: AdapterInfo, key: str, found: Shape | None, expected: Shape | None) -> UserError:
    return UserError(
        f"{info.path} does not match its own description at {key}: found {found or 'nothing'}, expected "
        f"{expected or 'nothing'}; copy it again"
    )
