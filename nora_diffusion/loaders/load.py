"""An adapter file into a pipeline: everything is checked before the pipeline is touched."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters import AdapterConfig
from ..adapters.config import Start
from ..adapters.tuner.build import build_delta, cast_frozen, flat_weight
from ..adapters.tuner.rank_mask import check_rank
from ..errors import UserError, first_line
from ..formats.adapter_file import BASIS_FOLDER, IN_FOLDERS, given_name, inspect_adapter, read_tensors, split_address
from ..formats.adapter_info import AdapterInfo
from ..formats.keys import file_key, token_key, token_vectors
from ..io.files import is_path
from ..io.tensor_file import Tensors
from ..pipelines.base import base_id
from ..pipelines.components import (
    Modules,
    canonical,
    components,
    fingerprint,
    nora_layers,
    pick,
    refuse_merged,
    refuse_offloaded,
    refuse_serving,
    same_weights,
    targets,
)
from ..pipelines.router_inputs import router_input_width
from .active import active_adapters, check_finite, keeping_trained, set_active
from .hotswap import swap
from .inject import all_or_nothing, check_new_name, derived_name, inject, remember, tie
from .locking import one_at_a_time
from .rank import cut_rank
from .tokens import add_words, check_new_words


@dataclass
class LoadedAdapter:
    """What ``load_adapter`` did: ``applied`` of ``total`` tensors, always equal, and what the file says of itself."""

    name: str
    applied: int
    total: int
    info: AdapterInfo

    @property
    def base(self) -> str:
        """The base that the adapter was trained on."""
        return self.info.base

    @property
    def trigger(self) -> str:
        """The word that calls the subject."""
        return self.info.trigger


@one_at_a_time
def load_adapter(
    pipe: Any,
    path_or_id: str | Path,
    adapter_name: str | None = None,
    activate: bool = True,
    weight: float = 1.0,
    basis_dir: str | Path | None = None,
    rank: int | None = None,
    hotswap: bool = False,
) -> LoadedAdapter:
    """Load an adapter from a file, a folder or a hub id; everything is checked before the pipeline is touched.

    A subject of a pack has the address ``pets.nora_pack.safetensors#dog``. LoRA, LoHa, LoKr and textual-inversion
    files of other tools are handed to diffusers or PEFT.
    ``activate=True`` makes it active at ``weight`` beside those already active; ``False`` leaves the active set alone.
    ``rank`` cuts an adapter that was trained for every rank (:func:`set_rank`).
    ``hotswap=True`` copies its numbers over those of the loaded adapter ``adapter_name``, whose targets, shapes and
    structure must be the same: no module changes, and a compiled model is not compiled again.
    Raises :class:`UserError` for a damaged file, another base (both are named), a name that is taken, or an adapter
    that does not fit the one it shall replace.
    """
    modules = components(pipe)
    refuse_serving(modules)
    file = located(path_or_id)
    info = inspect_adapter(file)
    is_here = file == Path(path_or_id).expanduser()  # the folder of a download is named by a commit
    called = given_name(info.path if is_here else path_or_id)
    name = adapter_name or derived_name(called)
    check_finite(name, weight)
    if info.kind != "nora":
        from .foreign import load_foreign

        if hotswap or rank is not None:
            option = "hotswap" if hotswap else "rank"
            raise UserError(f"{info.path} is {info.note}: {option} is for adapters of this toolkit, leave it out")
        count = load_foreign(pipe, modules, info, name, activate, weight)
        return LoadedAdapter(name, applied=count, total=count, info=info)
    configs = info.configs
    if rank is not None:
        for config in configs.values():
            check_rank(config, rank)
    chosen = pick(modules, configs)
    if not hotswap:
        check_new_name(pipe, modules, name, list(configs))
    refuse_merged(modules)
    refuse_offloaded(modules)
    tensors = read_tensors(info, basis_dir)
    _check_fit(info, configs, chosen, tensors, modules, base_id(pipe))
    if hotswap:
        swap(modules, name, info, tensors, activate, weight)
    else:
        check_new_words(pipe, modules, _token_shapes(info, tensors))
        place(pipe, modules, name, info, tensors, activate, weight)
    if rank is not None or (hotswap and all(config.rank_mask for config in configs.values())):
        cut_rank(modules, name, rank)  # a rank that was set for the one before does not outlive it
    return LoadedAdapter(name, applied=len(tensors), total=len(tensors), info=info)


def check_adapter(pipe: Any, path: str | Path) -> tuple[AdapterInfo, Tensors]:
    """What a file holds. Raises :class:`UserError` unless :func:`load_adapter` would take it; nothing is changed."""
    info = inspect_adapter(path)
    modules = components(pipe)
    chosen, tensors = pick(modules, info.configs), read_tensors(info)
    _check_fit(info, info.configs, chosen, tensors, modules, base_id(pipe))
    return info, tensors


def place(
    pipe: Any, modules: Modules, name: str, info: AdapterInfo, tensors: Tensors, activate: bool, weight: float
) -> None:
    """Put checked numbers into the pipeline as a new adapter that remembers ``info``, all or nothing."""
    with all_or_nothing(pipe, modules, name):
        for component, config in info.configs.items():
            module = modules[component]
            before = active_adapters(module)
            with keeping_trained(module):
                inject(module, config, name, Start(empty=True))
            remember(module, name, info)
            _fill(module, component, name, tensors)
            set_active(module, [*before, name] if activate else before)
            for layer in nora_layers(module, name).values():
                layer.set_scale(name, weight)
        add_words(pipe, modules, name, token_vectors(info.tokens, tensors))


def located(path_or_id: str | Path) -> Path:
    """Where an adapter lies; one with a hub id is fetched first. Raises :class:`UserError` where it cannot be."""
    if not isinstance(path_or_id, str | Path):
        raise UserError(f"{path_or_id!r} is no adapter: give a file, a folder, a pack's address or a hub id")
    path = Path(path_or_id)
    try:
        path = path.expanduser()
        known = path.exists()
    except (OSError, RuntimeError, ValueError):
        known = True  # no name that a file system takes: `inspect_adapter` says so
    if known or split_address(path) or is_path(str(path_or_id)) or "/" not in str(path_or_id):
        return path
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return _fetched(str(path_or_id))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise UserError(f"{path_or_id!r} is no local path, and the hub cannot be asked for it: {reason}") from error


def _fetched(hub_id: str) -> Path:
    """An adapter of a hub repository, by any name that adapters have in folders, and the shared basis that it needs."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(*names: str) -> Path | None:
        for name in names:
            try:
                return Path(hf_hub_download(hub_id, name))
            except LocalEntryNotFoundError:  # no connection
                raise
            except EntryNotFoundError:
                continue
        return None

    file = fetch(*IN_FOLDERS)
    if file is None:
        raise UserError(f"the hub's repository {hub_id!r} holds no adapter: none of {', '.join(IN_FOLDERS)} is in it")
    info = inspect_adapter(file, hashed=False)
    if info.basis == "shared":
        fetch(f"{BASIS_FOLDER}/{info.basis_sha256}.safetensors")  # where it is not, its reader says what is missing
    return file


def _check_fit(
    info: AdapterInfo,
    configs: dict[str, AdapterConfig],
    chosen: Modules,
    tensors: Tensors,
    modules: Modules,
    base: str,
) -> None:
    wrong_base = _wrong_base(info, base)
    expected: dict[str, tuple[int, ...]] = {}
    for part, module in chosen.items():
        config = copy.deepcopy(configs[part])
        config.start = Start(empty=True, condition=router_input_width(module, config.router))
        try:
            layers = {canonical(path): layer for path, layer in targets(module, config).items()}
        except UserError as error:
            raise wrong_base from error
        _check_fingerprint(info.base_fingerprint.get(part, {}), layers, wrong_base)
        for path, layer in layers.items():
            for factor, shape in _described(config, layer, path).items():
                expected[file_key(part, path, factor)] = shape
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    for part, keys in _token_keys(info).items():
        width = pick(modules, [part])[part].get_input_embeddings().embedding_dim  # type: ignore[operator]
        for key in keys:
            rows, *columns = found.get(key) or (1,)
            if columns and columns != [width]:
                raise wrong_base
            expected[key] = (rows, width)
    if found != expected:
        key = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))[0]
        raise UserError(
            f"{info.path} does not fit its own description at {key}: found {found.get(key, 'nothing')}, "
            f"expected {expected.get(key, 'nothing')}; copy it again"
        )


def _wrong_base(info: AdapterInfo, here: str) -> UserError:
    if info.base == here:
        return UserError(
            f"{info.path} was made for the base {here} with other weights than these: load it before they are cast to "
            "8 bits or otherwise changed"
        )
    return UserError(
        f"{info.path} was made for the base {info.base or 'unknown'}, which is not this pipeline's {here}: load it "
        "into its own base"
    )


def _token_keys(info: AdapterInfo) -> dict[str, list[str]]:
    """The keys of the words' vectors by text encoder."""
    keys: dict[str, list[str]] = {}
    for number, parts in enumerate(info.tokens.values()):
        for part in parts:
            keys.setdefault(part, []).append(token_key(number, part))
    return keys


def _token_shapes(info: AdapterInfo, tensors: Tensors) -> dict[str, dict[str, tuple[int, ...]]]:
    words = token_vectors(info.tokens, tensors)
    return {word: {part: tuple(value.shape) for part, value in own.items()} for word, own in words.items()}


def _described(config: AdapterConfig, layer: nn.Module, path: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the factors that a config describes, on the meta device: nothing is allocated yet."""
    outline = copy.copy(layer)
    outline._parameters = {"weight": layer.weight.detach().to("meta")}  # type: ignore[operator,dict-item]
    with torch.device("meta"):
        return {factor: tuple(value.shape) for factor, value in build_delta(config, outline, path).state_dict().items()}


def _check_fingerprint(stored: dict[str, float], layers: dict[str, nn.Module], error: UserError) -> None:
    if set(stored) != set(layers):
        raise error
    if not same_weights({path: fingerprint(layer, path) for path, layer in layers.items()}, stored):
        raise error


def _fill(module: nn.Module, part: str, name: str, tensors: Tensors) -> None:
    for path, layer in nora_layers(module, name).items():
        delta, weight = layer.delta(name), flat_weight(layer.base_layer)
        stored = {f: tensors[file_key(part, path, f)] for f in delta.state_dict()}
        delta.load_state_dict(stored)
        for f, buffer in delta.named_buffers():
            buffer.data = cast_frozen(buffer.to(stored[f].dtype), weight) if f in stored else buffer.to(weight.dtype)
        tie(layer, name)
