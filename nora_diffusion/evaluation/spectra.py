"""The update of an adapter in each layer: its norm, its singular values, and intruder dimensions.

Intruder dimensions (arXiv 2410.21228): among the top left singular vectors of ``W + dW``, those whose largest cosine
with any left singular vector of ``W`` is below a threshold. Many of them are a sign of forgetting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..adapters import NoraLayer
from ..adapters.deltas import functional
from ..adapters.deltas.chain import ChainDelta
from ..adapters.deltas.routed import RoutedDelta
from ..errors import UserError
from ..formats.adapter_file import inspect_adapter
from ..loaders import delete_adapter, load_adapter
from ..loaders.gates import GateSummary, router_summary
from ..pipelines.base import open_pipeline
from ..pipelines.components import components, nora_layers

NAME = "inspected"
TOP = 10
THRESHOLD = 0.5
MOST_VALUES = 64


@dataclass(frozen=True)
class LayerSpectrum:
    """One layer's update at weight 1.

    ``relative = ||dW|| / ||W||`` (Frobenius); ``singular_values`` of ``dW``, largest first, at most 64;
    ``stable_rank = ||dW||^2 / s_1^2``; ``intruders`` among the top 10, ``None`` if not computed. For a mixture
    (``mixture``) ``dW`` is the update at uniform gates.
    """

    component: str
    path: str
    shape: tuple[int, int]
    norm: float
    relative: float
    singular_values: tuple[float, ...]
    stable_rank: float
    intruders: int | None
    mixture: bool


def spectra(path: str | Path, pipe: Any = None, intruders: bool = False) -> list[LayerSpectrum]:
    """The spectra of all layers of an adapter, in the order of the model; see :func:`iter_spectra`."""
    return [spectrum for spectrum, _ in iter_spectra(path, pipe, intruders)]


def iter_spectra(file: str | Path, pipe: Any = None, intruders: bool = False) -> Iterator[tuple[LayerSpectrum, int]]:
    """Yields ``(spectrum, number of layers)``, layer by layer.

    ``pipe``: the adapter's base (default: the one named in the file); the adapter is deleted from it at the end.
    ``intruders`` costs two SVDs of each weight. Raises :class:`UserError` for an adapter of another base or of another
    tool.
    """
    if pipe is None:
        pipe = open_pipeline(inspect_adapter(file).base or None)
    load_adapter(pipe, file, NAME, activate=False)
    try:
        layers = [
            (component, path, layer)
            for component, module in components(pipe).items()
            for path, layer in nora_layers(module, NAME).items()
        ]
        if not layers:
            raise UserError(f"{file} has no layers of this toolkit: convert it with nora-diffusion import first")
        for component, path, layer in layers:
            yield layer_spectrum(component, path, layer, NAME, intruders), len(layers)
    finally:
        delete_adapter(pipe, NAME)


def gate_summaries(path: str | Path, pipe: Any, prompts: Sequence[str] | None = None) -> dict[str, GateSummary]:
    """A summary of the routers in a mixture's file, by ``component.path``; the adapter is deleted at the end."""
    load_adapter(pipe, path, NAME, activate=False)
    try:
        return router_summary(pipe, NAME, prompts)
    finally:
        delete_adapter(pipe, NAME)


@torch.no_grad()
def layer_spectrum(component: str, path: str, layer: NoraLayer, name: str, intruders: bool = False) -> LayerSpectrum:
    """The spectrum of one adapter in one layer, in fp32 on the CPU."""
    weight = cast(Tensor, layer.base_layer.weight).detach().flatten(1).float().cpu()
    values, update = _singular_values(layer, name, dense=intruders)
    values = values[values > values[:1] * 1e-6]  # the rest is rounding error of a low-rank product
    norm = float(values.square().sum().sqrt())
    return LayerSpectrum(
        component=component,
        path=path,
        shape=(weight.shape[0], weight.shape[1]),
        norm=norm,
        relative=norm / max(float(weight.norm()), 1e-30),
        singular_values=tuple(values[:MOST_VALUES].tolist()),
        stable_rank=(norm / float(values[0])) ** 2 if len(values) else 0.0,
        intruders=count_intruders(weight, update) if update is not None else None,
        mixture=isinstance(layer.delta(name), RoutedDelta),
    )


def _singular_values(layer: NoraLayer, name: str, dense: bool) -> tuple[Tensor, Tensor | None]:
    """The singular values of ``dW``, from its factors if it has any, and with ``dense`` also ``dW`` itself."""
    delta, scale = layer.delta(name), float(layer.scaling[name])
    if isinstance(delta, RoutedDelta):
        down, up = delta.pair(torch.full((delta.W_g.shape[0],), 1 / delta.W_g.shape[0], device=delta.W_g.device))
    elif isinstance(delta, ChainDelta) and layer.row_factors(name) is None:
        down, up = delta.pair()
    else:
        update = layer.get_delta_weight(name).flatten(1).float().cpu()
        return torch.linalg.svdvals(update), update
    down, up = down.float().cpu(), scale * up.float().cpu()
    return functional.product_svd(down, up)[1], up @ down if dense else None


def count_intruders(weight: Tensor, update: Tensor, top: int = TOP, threshold: float = THRESHOLD) -> int:
    """How many of the ``top`` left singular vectors of ``W + dW`` have no cosine of ``threshold`` with any of ``W``."""
    before = torch.linalg.svd(weight, full_matrices=False)[0]
    after = torch.linalg.svd(weight + update, full_matrices=False)[0][:, :top]
    return int(((before.T @ after).abs().amax(0) < threshold).sum())


def table(layers: list[LayerSpectrum]) -> str:
    """The layers as a text table, largest relative update first, and a last line with their mean."""
    width = max(len(f"{s.component}.{s.path}") for s in layers)
    lines = [f"{'layer':<{width}}  {'shape':>11}  |dW|/|W|  stable rank  largest s  intruders of {TOP}"]
    for s in sorted(layers, key=lambda s: -s.relative):
        first = s.singular_values[0] if s.singular_values else 0.0
        intruders = "" if s.intruders is None else str(s.intruders)
        shape = f"{s.shape[0]}x{s.shape[1]}"
        lines.append(
            f"{s.component + '.' + s.path:<{width}}  {shape:>11}  {s.relative:>9.4f}  {s.stable_rank:>11.2f}  "
            f"{first:>9.4f}  {intruders:>9}"
        )
    mean = sum(s.relative for s in layers) / len(layers)
    note = "; updates at uniform gates" if any(s.mixture for s in layers) else ""
    return "\n".join([*lines, f"{len(layers)} layers, mean |dW|/|W| {mean:.4f}{note}"])
