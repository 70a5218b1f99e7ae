"""The size of each method on real UNets, counted on the meta device."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapters import PRESETS, AdapterConfig
from ..adapters.axes import FROM_WEIGHTS
from ..adapters.config import Start
from ..adapters.deltas.chain import ChainDelta
from ..adapters.tuner.build import build_delta, flat_weight
from ..errors import UserError
from ..pipelines.components import targets

LAYOUTS: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""Arguments of ``UNet2DConditionModel`` for the UNets of Stable Diffusion 1.5 and SDXL."""
TITLES = {"sd15": "SD 1.5", "sdxl": "SDXL"}


@dataclass
class Cost:
    """The size of an adapter: trained parameters, bytes of its tensors, and bytes that a shared basis saves.

    ``ranks``: those of its plain LoRA; empty if it cannot be exported as one.
    """

    trained: int = 0
    file_bytes: int = 0
    basis_bytes: int = 0
    ranks: frozenset[int] = frozenset()


def layout(name: str) -> nn.Module:
    """A UNet on the meta device. Raises :class:`UserError` for an unknown name."""
    if name not in LAYOUTS:
        raise UserError(f"layout {name!r} is unknown: choose one of {', '.join(LAYOUTS)}")
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**LAYOUTS[name])


def cost(config: AdapterConfig, model: nn.Module) -> Cost:
    """The size of ``config`` on a model: trained parameters in fp32, frozen ones in the config's ``basis_dtype``."""
    config.start = Start(empty=True)
    groups: dict[tuple[tuple[int, ...], int], list[str]] = defaultdict(list)
    for path, layer in targets(model, config).items():
        groups[tuple(flat_weight(layer).shape), config.rank_for(path)].append(path)
    total = Cost()
    for ((d_out, d_in), _), paths in groups.items():
        count = len(paths)
        with torch.device("meta"):
            delta = build_delta(config, nn.Linear(d_in, d_out, bias=False), paths[0])
        trained = sum(parameter.numel() for parameter in delta.parameters())
        frozen = sum(value.numel() for value in delta.state_dict().values()) - trained
        basis_bytes = frozen * torch.finfo(getattr(torch, config.basis_dtype)).bits // 8
        total.trained += count * trained
        total.basis_bytes += count * basis_bytes
        total.file_bytes += count * (4 * trained + basis_bytes)
        if isinstance(delta, ChainDelta):
            total.ranks |= {delta.full_rank}
    return total


def method_table(methods: Iterable[str] | None = None, layouts: Iterable[str] | None = None) -> str:
    """A Markdown table of methods at their presets' defaults, on the attention projections of ``layouts``."""
    chosen = list(methods or PRESETS)
    unknown = [name for name in chosen if name not in PRESETS]
    if unknown:
        raise UserError(f"method {unknown[0]!r} is unknown: choose one of {', '.join(PRESETS)}")
    models = {name: layout(name) for name in layouts or LAYOUTS}
    heads = [f"{what}, {TITLES[name]}" for name in models for what in ("trained", "file")]
    rows = [["method", "what it computes", "defaults", *heads, "merges", "as a plain LoRA"]]
    rows.append(["---"] * len(rows[0]))
    rows += [_row(name, models) for name in chosen]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(name: str, models: Mapping[str, nn.Module]) -> list[str]:
    config = PRESETS[name]()
    costs = [cost(config, model) for model in models.values()]
    sizes = [text for c in costs for text in (f"{c.trained:,}", _size(c, config))]
    ranks = frozenset().union(*(c.ranks for c in costs))
    title, formula, link = described(name)
    merges, exports = ("yes", f"exact, rank {_span(ranks)}") if ranks else ("no", 'only with `gate="mean"`')
    if config.magnitude:
        exports += ", with magnitude"
    formula = formula.replace("|", r"\|")
    return [f"[{title}]({link}) `{name}`", f"`{formula}`", _defaults(config), *sizes, merges, exports]


def described(name: str) -> tuple[str, str, str]:
    """``(title, formula, link)`` of a method, from its preset's docstring."""
    text = " ".join(inspect.getdoc(PRESETS[name]).split())  # type: ignore[union-attr]
    head, link = re.match(r"(.+?): ``(.+?)``", text), re.search(r"https://\S+", text)
    assert head and link, f"the docstring of {name} begins with 'Title: ``formula``' and has a link"
    return head[1], head[2], link[0]


def _defaults(config: AdapterConfig) -> str:
    values = {"r": config.r}
    if config.has_inner_rank:
        values["r'"] = config.inner_r
    if config.router != "none":
        values["N"] = config.num_experts
    if config.blocks > 1:
        values["n"] = config.blocks
    return ", ".join(f"{name} = {value}" for name, value in values.items())


def _span(ranks: frozenset[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low} to {high}"


def _size(cost: Cost, config: AdapterConfig) -> str:
    own, rest = (f"{size / 1e6:.2f} MB" for size in (cost.file_bytes, cost.file_bytes - cost.basis_bytes))
    return f"{own}, {rest} shared" if config.basis in FROM_WEIGHTS else own
