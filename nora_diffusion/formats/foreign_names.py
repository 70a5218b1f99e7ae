"""Matches the modules of other tools' files to a pipeline's projections, by all names that tools use for them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from ..errors import UserError
from ..pipelines.components import Modules, canonical, projections
from ..pipelines.names import DENOISERS
from .foreign import DENOISER, T5, Module, Rows
from .foreign_dit import original_layers, swapped_layers
from .keys import Projection

ORIGINAL = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2", "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
"""Modules of a UNet under the names of the original Stable Diffusion code, which kohya's SDXL files use."""
IN_RESNET = {
    "conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
ROLES = {DENOISER: DENOISERS, T5: ("text_encoder_3", "text_encoder_2", "text_encoder")}
"""The components that a role may stand for; the first of them that has a projection of the module's name."""
ORIGINAL_DIT = re.compile(r"(joint|double|single)_blocks[._]")
"""Blocks of SD3's and Flux's transformers in their original code (:mod:`.foreign_dit`)."""
BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(.*)")


def match_projections(components: Modules, path: str, modules: list[Module]) -> dict[Projection, Module]:
    """The modules of the file at ``path`` by the projection that they adapt.

    Raises :class:`UserError` if the pipeline has no such projection or the file has two modules for it.
    """
    layers = {component: projections(model) for component, model in components.items()}
    paths = {component: paths_by_name(model) for component, model in components.items()}
    swapped_names = {component: _spellings(swapped_layers(model)) for component, model in components.items()}
    default = _default_component(path, paths, [module.name for module in modules if not module.component])
    found: dict[Projection, Module] = {}
    for module in modules:
        possible = ROLES.get(module.component, (module.component or default,))
        component = next((name for name in possible if module.name in paths.get(name, {})), None)
        if component is None:
            raise UserError(f"{path} {_missing(module, possible, components, modules)}")
        swapped = module.name in swapped_names[component]
        for part_path, part in _parts(module, paths[component][module.name], layers[component], swapped):
            projection = component, part_path
            if projection in found:
                names = f"{found[projection].name} and {module.name}"
                raise UserError(f"{path} adapts {'.'.join(projection)} twice, as {names}")
            found[projection] = part
    return found


def _parts(
    module: Module, paths: Sequence[str], layers: Mapping[str, nn.Module], swapped: bool
) -> Iterator[tuple[str, Module]]:
    """The projections of a module with their paths: one, or several with rows of their own."""
    if len(paths) == 1 and not swapped:
        yield paths[0], module
        return
    sizes = [cast(Tensor, layers[path].weight).shape[0] for path in paths]
    for path, size, stop in zip(paths, sizes, accumulate(sizes), strict=True):
        yield path, replace(module, rows=Rows(stop - size, stop, sum(sizes), swapped))


def _spellings(names: Iterable[str]) -> set[str]:
    """Names with dots and with underscores."""
    return {spelling for name in names for spelling in (name, name.replace(".", "_"))}


def _missing(module: Module, possible: Sequence[str], components: Modules, modules: list[Module]) -> str:
    """Why no projection of the pipeline matches a module, as the end of a sentence about its file."""
    if "transformer" in components and any(ORIGINAL_DIT.match(other.name) for other in modules):
        return (
            f"names the transformer's layers as the model's original code does ({module.name}): try "
            "pipe.load_lora_weights, or save it in diffusers' names with the tool that made it"
        )
    if module.component and (module.component == T5 or not any(name in components for name in possible)):
        owner = "a T5" if module.component == T5 else f"the {possible[0]}"
        return f"adapts {module.name} of {owner}, which this pipeline does not have: open a base with it"
    return f"was made for another base: this pipeline has no {module.name}"


def _default_component(path: str, paths: Mapping[str, Collection[str]], names: list[str]) -> str:
    """The component of a PEFT file, which does not state one: by its folder's name, else by its module ``names``.

    Raises :class:`UserError` if two components have projections of these names.
    """
    folder = Path(path).parent.name
    possible = [component for component, known in paths.items() if names and names[0] in known]
    if len(possible) > 1 and folder not in possible:
        raise UserError(
            f"{path} does not state whether it is for {' or '.join(possible)}: put it in a folder of that name"
        )
    return folder if folder in possible else next(iter(possible), "")


def paths_by_name(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The path of each projection by every name that files use for it, with dots or with underscores.

    A layer of a transformer's original code may be several projections, in the order of its output rows.
    """
    names: dict[str, tuple[str, ...]] = {}
    paths = list(projections(model))
    for path in paths:
        for name in (path, canonical(path), f"text_model.{canonical(path)}", *_original_names(model, path, paths)):
            names.setdefault(name, (path,))
    found: dict[str, tuple[str, ...]] = {}
    for name, parts in (names | original_layers(model)).items():
        found.setdefault(name, parts)
        found.setdefault(name.replace(".", "_"), parts)
    return found


def _original_names(model: nn.Module, path: str, paths: list[str]) -> Iterator[str]:
    """The name of a projection in the original Stable Diffusion code, if the model is a UNet and it has one."""
    layers = getattr(model, "config", {}).get("layers_per_block") if hasattr(model, "down_blocks") else None
    if isinstance(layers, int) and (name := original_name(path, layers, paths)) is not None:
        yield name


def original_name(path: str, layers: int, paths: Collection[str]) -> str | None:
    """The name of a UNet's projection in Stability AI's code, ``input_blocks.4.1.proj_in``, or ``None``.

    ``layers``: the UNet's ``layers_per_block``. ``paths``: all its projections, by which blocks with attention are
    known.
    """
    start = next((name for name in ORIGINAL if f"{path}.".startswith(f"{name}.")), None)
    if start is not None:
        return ORIGINAL[start] + _original_suffix(path.removeprefix(start))
    if (match := BLOCK.fullmatch(path)) is None:
        return None
    side, block, kind, index, suffix = match.groups()
    # A block counts `layers` pairs of resnet and attention (one more on the way up), and its down- or upsampler.
    number = int(block) * (layers + 1) + (layers if kind.endswith("samplers") else int(index))
    if side == "down":
        slot = "0.op" if kind == "downsamplers" else str(int(kind == "attentions"))
        return f"input_blocks.{number + 1}.{slot}{'' if kind == 'downsamplers' else _original_suffix(suffix)}"
    has_attention = any(other.startswith(f"up_blocks.{block}.attentions.") for other in paths)
    slot = {"resnets": "0", "attentions": "1", "upsamplers": "2" if has_attention else "1"}[kind]
    return f"output_blocks.{number}.{slot}{_original_suffix(suffix)}"


def _original_suffix(path: str) -> str:
    return f".{IN_RESNET[path[1:]]}" if path[1:] in IN_RESNET else path
