"""Turns mixed updates into an adapter: a config for each component, and the tensors by file key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..adapters import AdapterConfig, lora
from ..adapters.axes import CoreKind, OutputRouter
from ..adapters.patterns import pattern_of
from ..errors import UserError
from ..formats.keys import Projection, file_key
from ..io.tensors import Tensors
from .sources import Source
from .updates import Update

Targets = str | list[str] | None
Factors = dict[str, Tensors]
"""Factors by path and name."""
METHODS: dict[CoreKind, str] = {"nested": "nora", "dense": "lora_xs", "input": "nora_input"}
"""The method of a mix whose core is another one than its parents'."""


def assemble(
    updates: Mapping[Projection, Update], sources: Sequence[Source]
) -> tuple[dict[str, AdapterConfig], Tensors]:
    """One adapter with these updates: in the parents' basis if all updates have cores, else a LoRA."""
    configs: dict[str, AdapterConfig] = {}
    tensors: Tensors = {}
    for component in dict.fromkeys(component for component, _ in updates):
        own = {path: update for (other, path), update in updates.items() if other == component}
        adapting = [source for source in sources if any(other == component for other, _ in source.updates)]
        parents = [source.configs.get(component) for source in adapting]
        if any(update.core is None for update in own.values()):
            config, factors = _lora(own)
        else:
            config, factors = _in_basis(own, next(parent for parent in parents if parent is not None))
        config.target_modules, config.exclude_modules = _targets(own, parents)
        configs[component] = config
        tensors |= {
            file_key(component, path, factor): value.contiguous()
            for path, layer in factors.items()
            for factor, value in layer.items()
        }
    return configs, tensors


def assemble_gated(
    sources: Sequence[Source], weights: Sequence[float], router: OutputRouter
) -> tuple[dict[str, AdapterConfig], Tensors]:
    """The mixture of all sources as frozen experts, whose gate gives all the same share (MoLE).

    ``w_i dW_i = Q_i P_i`` by SVD, so that the columns of ``Q_i`` are orthonormal; ranks below the largest of a
    layer are padded with zeros. Raises :class:`UserError` unless all sources adapt one component, the same.
    """
    adapted = sorted({component for source in sources for component, _ in source.updates})
    if len(adapted) > 1:
        raise UserError(
            f"the adapters change {' and '.join(adapted)}, and gates are learned for one model: train them without the "
            "text encoder, or keep them apart with set_adapters"
        )
    (component,), tensors, ranks = adapted, Tensors(), dict[str, int]()
    for path in dict.fromkeys(path for source in sources for _, path in source.updates):
        found = [source.updates.get((component, path)) for source in sources]
        d_out, d_in = next(update.shape for update in found if update is not None)
        experts = [_expert(u, w, d_out, d_in) for u, w in zip(found, weights, strict=True)]
        ranks[path] = r = max(down.shape[0] for down, _ in experts)
        padded = [_pad_rank(down, up, r) for down, up in experts]
        tensors[file_key(component, path, "A_out")] = torch.cat([down for down, _ in padded]).float().contiguous()
        tensors[file_key(component, path, "B_out")] = torch.cat([up for _, up in padded], 1).float().contiguous()
        tensors[file_key(component, path, "W_g")] = torch.zeros(len(sources), len(sources) * r)
    largest, pattern = _ranks(ranks)
    config = AdapterConfig(
        method="mole", r=largest, rank_pattern=pattern, inner_r=1, core="none", basis="kaiming", basis_dtype="float32",
        experts="frozen", router=router, num_experts=len(sources),
    )  # fmt: skip
    config.target_modules, config.exclude_modules = _targets(ranks, [s.configs.get(component) for s in sources])
    return {component: config}, tensors


def _expert(update: Update | None, weight: float, d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
    """``P [k, d_in]`` and orthonormal ``Q [d_out, k]``; of rank 1 and zero where a source does not adapt the layer."""
    if update is None:
        return torch.zeros(1, d_in, dtype=torch.float64), torch.zeros(d_out, 1, dtype=torch.float64)
    u, s, v = update.svd()
    return weight * s.unsqueeze(1) * v.T, u


def _targets(updates: Mapping[str, object], parents: Sequence[AdapterConfig | None]) -> tuple[Targets, Targets]:
    """``(target_modules, exclude_modules)``: the parents' if all agree, else every path."""
    patterns = [(p.target_modules, p.exclude_modules) for p in parents if p is not None]
    if len(patterns) == len(parents) and all(pair == patterns[0] for pair in patterns):
        return patterns[0]
    return sorted(updates), None


def _lora(updates: Mapping[str, Update]) -> tuple[AdapterConfig, Factors]:
    pairs = {path: _limit_rank(*update.pair()) for path, update in updates.items()}
    factors = {path: {"A": down.float(), "B": up.float()} for path, (down, up) in pairs.items()}
    r, pattern = _ranks({path: down.shape[0] for path, (down, _) in pairs.items()})
    return lora(r=r, rank_pattern=pattern), factors


def _in_basis(updates: Mapping[str, Update], parent: AdapterConfig) -> tuple[AdapterConfig, Factors]:
    """An adapter in the basis of ``parent``, with the inner ranks of the updates; its core is :func:`_core_kind`."""
    outer = {path: update.down.shape[0] for path, update in updates.items()}
    inner = {path: min(max(update.rank, 1), outer[path]) for path, update in updates.items()}
    core = _core_kind(outer, inner, updates)
    dtype = getattr(torch, parent.basis_dtype)  # lossless: the basis was rounded to it when it was made
    factors: Factors = {}
    for path, update in updates.items():
        factors[path] = _core_factors(update, core, inner[path])
        if parent.stored_outer:
            factors[path]["A_out"] = update.down.to(dtype)
        if parent.stored_outer and core != "input":
            factors[path]["B_out"] = update.up.to(dtype)
    # A basis that is determined by the shapes derives its outer rank from r, the same for all parents. A stored basis
    # of blocks is written as full matrices. No rank mask: cutting the rank would remove the later adapters of the mix.
    r, pattern, blocks = (*_ranks(outer), 1) if parent.stored_outer else (parent.r, parent.rank_pattern, parent.blocks)
    inner_r, inner_pattern = (1, {}) if core == "dense" else _ranks(inner)
    config = replace(
        parent, r=r, rank_pattern=pattern, core=core, inner_r=inner_r, inner_rank_pattern=inner_pattern, alpha=None,
        alpha_pattern={}, method=parent.method if parent.core == core else METHODS[core], trained=[], dropout=0.0,
        blocks=blocks, rank_mask=False, rank_scales="none",
    )  # fmt: skip
    return config, factors


def _core_kind(outer: Mapping[str, int], inner: Mapping[str, int], updates: Mapping[str, Update]) -> CoreKind:
    """``input`` if any update has its own output side, else ``nested``, or ``dense`` if that has fewer parameters."""
    if any(update.core is not None and update.core[1] is None for update in updates.values()):
        return "input"
    nested, dense = sum(2 * r * inner[path] for path, r in outer.items()), sum(r * r for r in outer.values())
    return "nested" if nested < dense else "dense"


def _core_factors(update: Update, core: CoreKind, rank: int) -> Tensors:
    """The trained factors of one projection, at inner rank ``rank``."""
    assert update.core is not None
    if core == "input":
        down, up = _pad_rank(*update.behind_input(), rank)
        return {"A_in": down.float(), "B": up.float()}
    down, up = (factor.double() for factor in update.core if factor is not None)
    if core == "dense":
        return {"R": (up @ down).float()}
    down, up = _pad_rank(down, up, rank)
    return {"A_in": down.float(), "B_in": up.float()}


def _ranks(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """``r`` and ``rank_pattern``: the largest rank, and the path of every projection with another one."""
    r = max(ranks.values())
    return r, {pattern_of(path): rank for path, rank in ranks.items() if rank != r}


def _limit_rank(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with a rank of at most ``min(d_out, d_in)``, which stacked pairs may exceed."""
    (rank, d_in), d_out = down.shape, up.shape[0]
    if rank <= min(d_in, d_out):
        return down, up
    dense, unit = up @ down, torch.eye(min(d_in, d_out), dtype=down.dtype)
    return (dense, unit) if d_out <= d_in else (unit, dense)


def _pad_rank(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same product at rank ``rank``, zero-padded. ``rank`` must be the full one or at least the pair's own."""
    down, up = _limit_rank(down, up)
    missing = rank - down.shape[0]
    return torch.nn.functional.pad(down, (0, 0, 0, missing)), torch.nn.functional.pad(up, (0, missing))
