"""From mixed updates to an adapter: the config of each component and its tensors by file key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..adapters import AdapterConfig, lora
from ..adapters.axes import CoreKind
from ..adapters.patterns import pattern_of
from ..formats.adapter_file import Tensors
from .sources import Key, Source
from .updates import Update

Targets = str | list[str] | None


def assemble(updates: Mapping[Key, Update], sources: Sequence[Source]) -> tuple[dict[str, AdapterConfig], Tensors]:
    """One adapter that holds these updates: inside the parents' basis where all have cores, else a LoRA."""
    configs: dict[str, AdapterConfig] = {}
    tensors: Tensors = {}
    for part in dict.fromkeys(part for part, _ in updates):
        mine = {path: update for (component, path), update in updates.items() if component == part}
        holders = [source for source in sources if any(component == part for component, _ in source.updates)]
        parents = [source.configs.get(part) for source in holders]
        if all(update.core is not None for update in mine.values()):
            config, factors = _with_core(mine, [parent for parent in parents if parent is not None])
        else:
            config, factors = _plain(mine)
        config.target_modules, config.exclude_modules = _targets(mine, parents)
        configs[part] = config
        tensors |= {f"{part}.{key}": value.contiguous() for key, value in factors.items()}
    return configs, tensors


def _targets(updates: Mapping[str, Update], parents: Sequence[AdapterConfig | None]) -> tuple[Targets, Targets]:
    """The parents' own description of where they sit, where all say the same, else every path."""
    said = [(p.target_modules, p.exclude_modules) for p in parents if p is not None]
    if len(said) == len(parents) and all(pair == said[0] for pair in said):
        return said[0]
    return sorted(updates), None


def _plain(updates: Mapping[str, Update]) -> tuple[AdapterConfig, Tensors]:
    pairs = {path: _at_most_full(*update.pair()) for path, update in updates.items()}
    factors = {f"{path}.nora_A": down.float() for path, (down, _) in pairs.items()}
    factors |= {f"{path}.nora_B": up.float() for path, (_, up) in pairs.items()}
    r, pattern = _ranks({path: down.shape[0] for path, (down, _) in pairs.items()})
    return lora(r=r, rank_pattern=pattern), factors


def _with_core(updates: Mapping[str, Update], parents: Sequence[AdapterConfig]) -> tuple[AdapterConfig, Tensors]:
    """Nested cores of the largest inner rank, or dense ones where those are fewer numbers."""
    first = parents[0]
    outer = {path: update.down.shape[0] for path, update in updates.items()}
    inner_r = max(update.rank for update in updates.values())
    nested = sum(2 * r * min(inner_r, r) for r in outer.values()) < sum(r * r for r in outer.values())
    factors: Tensors = {}
    for path, update in updates.items():
        assert update.core is not None
        down, up = (factor.double() for factor in update.core)
        if nested:
            down, up = _of_rank(down, up, min(inner_r, outer[path]))
            factors |= {f"{path}.nora_A_in": down.float(), f"{path}.nora_B_in": up.float()}
        else:
            factors[f"{path}.nora_R"] = (up @ down).float()
        if first.stored_outer:
            kept = getattr(torch, first.basis_dtype)  # they were rounded to it when they were made
            factors |= {f"{path}.nora_A_out": update.down.to(kept), f"{path}.nora_B_out": update.up.to(kept)}
    # A basis that follows from the shapes has its own way from r to the outer rank, the same for all parents. Blocks
    # are written out where they are stored; a cut to a rank would take away the later parts.
    r, pattern, blocks = (*_ranks(outer), 1) if first.stored_outer else (first.r, first.rank_pattern, first.blocks)
    core: CoreKind = "nested" if nested else "dense"
    config = replace(
        first, r=r, rank_pattern=pattern, core=core, inner_r=inner_r if nested else 1, alpha=None, alpha_pattern={},
        method=first.method if first.core == core else "nora" if nested else "lora_xs", trained=[], dropout=0.0,
        blocks=blocks, rank_mask=False,
    )  # fmt: skip
    return config, factors


def _ranks(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """The largest rank, and the others by path."""
    r = max(ranks.values())
    return r, {pattern_of(path): rank for path, rank in ranks.items() if rank != r}


def _at_most_full(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with a rank of at most ``min(d_out, d_in)``, where stacking went beyond."""
    (rank, d_in), d_out = down.shape, up.shape[0]
    if rank <= min(d_in, d_out):
        return down, up
    dense, unit = up @ down, torch.eye(min(d_in, d_out), dtype=down.dtype)
    return (dense, unit) if d_out <= d_in else (unit, dense)


def _of_rank(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same product with a rank of exactly ``rank``, which is the full one or at least the pair's own."""
    down, up = _at_most_full(down, up)
    missing = rank - down.shape[0]
    return torch.nn.functional.pad(down, (0, 0, 0, missing)), torch.nn.functional.pad(up, (0, missing))
