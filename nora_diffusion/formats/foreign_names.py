"""Which projection of a pipeline a module of another tool's file is for: by all the names that tools have for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from ..errors import UserError
from ..pipelines.components import Modules, canonical, projections
from .foreign import Module
from .keys import Projection

ORIGINAL = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2", "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
"""Parts of a UNet as the original code names them, which kohya's files for SDXL follow."""
IN_RESNET = {
    "conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(.*)")


def places(components: Modules, path: str, modules: list[Module]) -> dict[Projection, Module]:
    """The projection that each module of the file at ``path`` is for.

    Raises :class:`UserError` for one that this pipeline has not, or that the file names twice.
    """
    names = {part: names_of(module) for part, module in components.items()}
    nameless = _component_of(path, names, [module.name for module in modules if not module.component])
    found: dict[Projection, Module] = {}
    for module in modules:
        part = module.component or nameless
        where = (part, names[part][module.name]) if module.name in names.get(part, {}) else None
        if where is None:
            raise UserError(f"{path} was made for another base: this pipeline has no {module.name}")
        if where in found:
            raise UserError(f"{path} is for {'.'.join(where)} twice, as {found[where].name} and {module.name}")
        found[where] = module
    return found


def _component_of(path: str, names: dict[str, dict[str, str]], wanted: list[str]) -> str:
    """What PEFT's own files are for, which do not say it: the folder's name tells, or else the projections' names.

    Raises :class:`UserError` where two components have projections of these names.
    """
    folder = Path(path).parent.name
    parts = [part for part, known in names.items() if wanted and wanted[0] in known]
    if len(parts) > 1 and folder not in parts:
        raise UserError(
            f"{path} does not say which of {' and '.join(parts)} it is for: put it in a folder of that name"
        )
    return folder if folder in parts else next(iter(parts), "")


def names_of(model: nn.Module) -> dict[str, str]:
    """The path of each projection by every name that files have for it, with dots or with underscores."""
    found: dict[str, str] = {}
    paths = list(projections(model))
    for path in paths:
        for name in (path, canonical(path), f"text_model.{canonical(path)}", *_original_names(model, path, paths)):
            found.setdefault(name, path)
            found.setdefault(name.replace(".", "_"), path)
    return found


def _original_names(model: nn.Module, path: str, paths: list[str]) -> Iterator[str]:
    """The name of a UNet's projection in the original code of Stable Diffusion, if it has one."""
    start = next((name for name in ORIGINAL if f"{path}.".startswith(f"{name}.")), None)
    layers = getattr(model, "config", {}).get("layers_per_block") if hasattr(model, "down_blocks") else None
    if start is not None and layers is not None:
        yield ORIGINAL[start] + _inside(path.removeprefix(start))
    if (match := BLOCK.fullmatch(path)) is None or not isinstance(layers, int):
        return
    side, block, kind, index, inside = match.groups()
    # Each block is its pairs of resnet and attention, one more of them on the way up, and its resampling.
    number = int(block) * (layers + 1) + (layers if kind.endswith("samplers") else int(index))
    if side == "down":
        slot = "0.op" if kind == "downsamplers" else str(int(kind == "attentions"))
        yield f"input_blocks.{number + 1}.{slot}{'' if kind == 'downsamplers' else _inside(inside)}"
    else:
        attended = any(other.startswith(f"up_blocks.{block}.attentions.") for other in paths)
        slot = {"resnets": "0", "attentions": "1", "upsamplers": "2" if attended else "1"}[kind]
        yield f"output_blocks.{number}.{slot}{_inside(inside)}"


def _inside(path: str) -> str:
    return f".{IN_RESNET[path[1:]]}" if path[1:] in IN_RESNET else path
