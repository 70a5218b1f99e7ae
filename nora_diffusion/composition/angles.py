"""Overlap of two adapters: how much they change the same directions of the same weights, from 0 to 1."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..formats.keys import Projection
from ..pipelines.components import components
from .sources import Source, check_same_base, file_source, loaded_source
from .updates import Update

ENERGY = 0.7
"""Share of an update's energy (squared singular values) in its leading directions; the rest is small and random."""
WARN_ABOVE = 0.2
"""Between the scores of independent subjects and those of two runs of one subject, see ``docs/mixing.md``."""


@dataclass
class Overlap:
    """The score of two adapters, and of every projection that both adapt."""

    score: float
    layers: dict[Projection, float]


def overlap(pipe: Any, one: str, two: str) -> Overlap:
    """How much two adapters of a pipeline overlap; the weights set for them are ignored.

    For each projection take the ``k_a`` leading left and right singular vectors ``U_a``, ``V_a`` of ``dW_a`` that hold
    70% of its energy, and the same for ``dW_b``. With the principal angles ``t_i`` between two subspaces::

        c(U_a, U_b) = sum_i cos^2(t_i) / min(k_a, k_b) = ||U_a^T U_b||_F^2 / min(k_a, k_b)
        layer = c(U_a, U_b) * c(V_a, V_b)
        score = sum_l w_l layer_l / sum_l w_l,   w_l = ||dW_a||_F ||dW_b||_F

    A layer scores 1 if the column spaces and the row spaces are equal, and 0 if either are orthogonal: two updates
    interfere only if they read the same input directions *and* write the same output directions. Computed from the
    factors by QR; ``dW`` itself is never formed.

    Raises :class:`UserError` for an unknown adapter or one without a single ``dW`` (MoR, DoRA).
    """
    modules = components(pipe)
    return source_overlap(loaded_source(modules, one), loaded_source(modules, two))


def overlap_files(one: str | Path, two: str | Path, basis_dir: str | Path | None = None) -> Overlap:
    """:func:`overlap` for two adapter files. Also raises :class:`UserError` if their bases differ."""
    sources = [file_source(one, basis_dir), file_source(two, basis_dir)]
    check_same_base(sources)
    return source_overlap(*sources)


def source_overlap(one: Source, two: Source) -> Overlap:
    """:func:`overlap` for two adapters that have been read."""
    layers: dict[Projection, float] = {}
    total = weights = 0.0
    for key in (key for key in one.updates if key in two.updates):
        layers[key], weight = _layer(one.updates[key], two.updates[key])
        total, weights = total + weight * layers[key], weights + weight
    return Overlap(total / weights if weights else 0.0, layers)


def _layer(one: Update, two: Update) -> tuple[float, float]:
    """Score and weight of one projection."""
    (u_one, s_one, v_one), (u_two, s_two, v_two) = one.svd(), two.svd()
    weight = float(s_one.norm() * s_two.norm())
    if weight == 0:
        return 0.0, 0.0
    k_one, k_two = _leading(s_one), _leading(s_two)
    columns = _similarity(u_one[:, :k_one], u_two[:, :k_two])
    return columns * _similarity(v_one[:, :k_one], v_two[:, :k_two]), weight


def _leading(s: Tensor) -> int:
    """Number of leading singular values that hold :data:`ENERGY`."""
    energy = s.square().cumsum(0) / s.square().sum()
    return int((energy < ENERGY).sum()) + 1


def _similarity(one: Tensor, two: Tensor) -> float:
    """Mean ``cos^2`` of the principal angles between two subspaces, given by orthonormal columns."""
    return min(1.0, float((one.T @ two).square().sum()) / min(one.shape[1], two.shape[1]))
