"""Adapters in and out of a diffusers pipeline: add, load, save, weigh, delete, list."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

from .adapter_file import (
    DESCRIPTIVE,
    DTYPES,
    FILE_NAME,
    AdapterInfo,
    BasisKind,
    Tensors,
    inspect_adapter,
    read_tensors,
    write_adapter,
)
from .adapters import AdapterConfig, NoraLayer
from .adapters.config import Start
from .adapters.layer import build_delta, flat_weight
from .base import base_id
from .calibration import activation_strengths
from .components import (
    canonical,
    component,
    denoiser_name,
    fingerprint,
    nora_layers,
    present,
    refuse_merged,
    targets,
    tuner_layers,
)
from .errors import UserError
from .versions import versions

FINGERPRINT_TOLERANCE = 1e-2


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


def add_adapter(
    pipe: Any,
    config: AdapterConfig,
    adapter_name: str = "default",
    components: Sequence[str] | None = None,
    calibration: Sequence[str] | None = None,
) -> None:
    """Put a fresh adapter into a pipeline; it starts as an exact no-op, is active and trainable.

    ``components``: names among unet, transformer, text_encoder ... (default: the denoiser). ``calibration``: prompts
    for the activation statistics of ``awsvd`` (default: generic ones, so that the basis belongs to no subject).
    """
    names = list(components or [denoiser_name(pipe)])
    modules = {name: component(pipe, name) for name in names}
    _check_new_name(pipe, adapter_name, names)
    refuse_merged(pipe)
    layers = {name: targets(module, config) for name, module in modules.items()}
    strengths: dict[str, dict[str, Tensor]] = {}
    if config.basis == "awsvd":
        strengths = activation_strengths(pipe, layers, calibration)
    for name in names:
        unused = set(layers[name]) - set(strengths.get(name, layers[name]))
        if unused:
            raise UserError(f"{sorted(unused)[0]!r} was never called while calibrating: exclude it or use basis='svd'")
    with _all_or_nothing(pipe, adapter_name):
        for name, module in modules.items():
            _inject(module, config, adapter_name, Start(strengths.get(name, {})))
            _train(module, adapter_name)


def _check_new_name(pipe: Any, name: str, components: Sequence[str]) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in "nora_delta":
        raise UserError(
            f"the adapter name {name!r} will not do: use letters, digits, '_' and '-', and no part of 'nora_delta'"
        )
    taken = {c for c in components if name in getattr(component(pipe, c), "peft_config", {})}
    if taken:
        raise UserError(f"an adapter named {name!r} is already in the {', '.join(sorted(taken))}: delete it or rename")


def _inject(module: nn.Module, config: AdapterConfig, name: str, start: Start) -> None:
    own = copy.deepcopy(config)
    own.start = start
    with warnings.catch_warnings():
        # PEFT warns of every second adapter on a model; several at once is what this toolkit is for.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        # A pattern may be meant for another component of the same pipeline.
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match")
        inject_adapter_in_model(own, module, name)
    own.start = Start()
    module._hf_peft_config_loaded = True  # type: ignore[assignment]


@contextmanager
def _all_or_nothing(pipe: Any, name: str) -> Iterator[None]:
    """Takes a half-added adapter out again when anything fails on the way (out of memory, say)."""
    try:
        yield
    except BaseException:
        if any(name in names for names in list_adapters(pipe).values()):
            delete_adapter(pipe, name)
        raise


def _train(module: nn.Module, name: str) -> None:
    """Only the trained factors of this adapter want gradients, as fp32 master numbers."""
    module.requires_grad_(False)
    for layer in nora_layers(module, name).values():
        for parameter in layer.delta(name).parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def trainable_parameters(pipe: Any, adapter_name: str = "default") -> dict[str, nn.Parameter]:
    """The trained factors of an adapter by their key in the adapter file."""
    return {
        _file_key(name, path, factor): parameter
        for name in present(pipe)
        for path, layer in nora_layers(getattr(pipe, name), adapter_name).items()
        for factor, parameter in layer.delta(adapter_name).named_parameters()
    }


def _file_key(component_name: str, path: str, factor: str) -> str:
    return f"{component_name}.{path}.nora_{factor.removeprefix('core.')}"


def _factors(module: nn.Module, component_name: str, adapter_name: str) -> Tensors:
    return {
        _file_key(component_name, path, factor): value.detach()
        for path, layer in nora_layers(module, adapter_name).items()
        for factor, value in layer.delta(adapter_name).state_dict().items()
    }


def save_adapter(
    pipe: Any,
    path: str | Path,
    adapter_name: str = "default",
    *,
    dtype: str | None = None,
    basis: BasisKind = "own",
    basis_dir: str | Path | None = None,
    info: AdapterInfo | Mapping[str, Any] | None = None,
    card: str | None = None,
) -> Path:
    """Write ``path/nora_adapter.safetensors`` and its model card; returns the file.

    Trained factors keep their dtype (``dtype="fp16"`` or ``"bf16"`` on request), frozen ones are stored in the
    config's ``basis_dtype``, to which they were rounded before training: save then load is exact.
    ``basis="shared"`` stores the frozen factors once in ``bases/<sha256>.safetensors`` beside the adapter's folder.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
    holders = [name for name in present(pipe) if nora_layers(getattr(pipe, name), adapter_name)]
    if not holders:
        raise UserError(f"there is no adapter named {adapter_name!r} in the pipeline: {_names_hint(pipe)}")
    tensors: Tensors = {}
    result = _describe(info)
    result.base, result.basis, result.versions = base_id(pipe), basis, versions()
    for name in holders:
        module = getattr(pipe, name)
        config = module.peft_config[adapter_name]
        if basis == "shared" and not config.frozen_outer:
            raise UserError(f"method {config.method!r} has no frozen basis to share: save it with basis='own'")
        result.components[name] = config.to_dict()
        layers = nora_layers(module, adapter_name)
        result.base_fingerprint[name] = {p: round(_clean_fingerprint(layer, p), 9) for p, layer in layers.items()}
        result.conv_shapes |= {
            f"{name}.{p}": list(layer.base_layer.weight.shape[1:])
            for p, layer in layers.items()
            if isinstance(layer.base_layer, nn.Conv2d)
        }
        tensors |= {
            key: _stored(key, value, config, dtype) for key, value in _factors(module, name, adapter_name).items()
        }
    folder = Path(path).expanduser()
    file = write_adapter(folder, tensors, result, basis_dir)
    from .model_card import write_card

    write_card(folder, inspect_adapter(file), card)
    return file


def _clean_fingerprint(layer: NoraLayer, path: str) -> float:
    if layer.merged:
        raise UserError("an adapter is fused into the weights: call unfuse_lora() before saving")
    return fingerprint(layer.base_layer, path)


def _describe(info: AdapterInfo | Mapping[str, Any] | None) -> AdapterInfo:
    values = dict(info) if isinstance(info, Mapping) else {k: getattr(info, k) for k in DESCRIPTIVE if info}
    unknown = set(values) - set(DESCRIPTIVE)
    if unknown:
        raise UserError(f"info key {sorted(unknown)[0]!r} is unknown: use {', '.join(DESCRIPTIVE)}")
    return AdapterInfo(components={}, **values)


def _stored(key: str, value: Tensor, config: AdapterConfig, dtype: str | None) -> Tensor:
    if key.endswith(("nora_A_out", "nora_B_out")):
        return value.to("cpu", getattr(torch, config.basis_dtype))
    return value.to("cpu", DTYPES[dtype] if dtype else value.dtype)


def load_adapter(
    pipe: Any,
    path_or_id: str | Path,
    adapter_name: str | None = None,
    activate: bool = True,
    weight: float = 1.0,
    basis_dir: str | Path | None = None,
) -> LoadedAdapter:
    """Load an adapter from a file, a folder or a hub id; everything is checked before the pipeline is touched.

    ``activate=True`` makes it active at ``weight`` beside those already active; ``False`` leaves the active set alone.
    Raises :class:`UserError` for a damaged file, another base (both are named) or a name that is taken.
    """
    info = inspect_adapter(_local(path_or_id))
    name = adapter_name or _name_from(Path(info.path))
    configs = info.configs
    modules = {part: component(pipe, part) for part in configs}
    _check_new_name(pipe, name, list(configs))
    refuse_merged(pipe)
    tensors = read_tensors(info, basis_dir)
    _check_fit(info, configs, modules, tensors, pipe)
    with _all_or_nothing(pipe, name):
        for part, module in modules.items():
            before = active_adapters(module)
            _inject(module, configs[part], name, Start(empty=True))
            _fill(module, part, name, tensors)
            _activate(module, [*before, name] if activate else before)
            for layer in nora_layers(module, name).values():
                layer.set_scale(name, weight)
    return LoadedAdapter(name, applied=len(tensors), total=len(tensors), info=info)


def _local(path_or_id: str | Path) -> Path:
    path = Path(path_or_id).expanduser()
    if path.exists() or str(path_or_id).count("/") != 1 or str(path_or_id).startswith((".", "/")):
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(path_or_id), FILE_NAME))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{path_or_id!r} is no local path, and the hub cannot be asked for it: {error}") from error


def _name_from(file: Path) -> str:
    stem = file.parent.name if file.name == FILE_NAME else file.stem
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem) or "adapter"


def _check_fit(
    info: AdapterInfo,
    configs: dict[str, AdapterConfig],
    modules: dict[str, nn.Module],
    tensors: Tensors,
    pipe: Any,
) -> None:
    wrong_base = UserError(
        f"{info.path} was made for the base {info.base or 'unknown'}, which is not this pipeline's {base_id(pipe)}: "
        "load it into its own base"
    )
    expected: dict[str, tuple[int, ...]] = {}
    for part, module in modules.items():
        config = copy.deepcopy(configs[part])
        config.start = Start(empty=True)
        try:
            layers = {canonical(path): layer for path, layer in targets(module, config).items()}
        except UserError as error:
            raise wrong_base from error
        _check_fingerprint(info.base_fingerprint.get(part, {}), layers, wrong_base)
        for path, layer in layers.items():
            for factor, value in build_delta(config, layer, path).state_dict().items():
                expected[_file_key(part, path, factor)] = tuple(value.shape)
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    if found != expected:
        key = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))[0]
        raise UserError(
            f"{info.path} does not fit its own description at {key}: found {found.get(key, 'nothing')}, "
            f"expected {expected.get(key, 'nothing')}; copy it again"
        )


def _check_fingerprint(stored: dict[str, float], layers: dict[str, nn.Module], error: UserError) -> None:
    if set(stored) != set(layers):
        raise error
    ours = torch.tensor([fingerprint(layer, path) for path, layer in layers.items()], dtype=torch.float64)
    theirs = torch.tensor([stored[path] for path in layers], dtype=torch.float64)
    if not (ours - theirs).norm() <= FINGERPRINT_TOLERANCE * theirs.norm():
        raise error


def _fill(module: nn.Module, part: str, name: str, tensors: Tensors) -> None:
    for path, layer in nora_layers(module, name).items():
        state = layer.delta(name).state_dict()
        layer.delta(name).load_state_dict({f: tensors[_file_key(part, path, f)] for f in state})
        for buffer_name, buffer in layer.delta(name).named_buffers():
            layer.delta(name).get_buffer(buffer_name).data = buffer.to(flat_weight(layer.base_layer).dtype)


def active_adapters(module: nn.Module) -> list[str]:
    """Names of the active adapters of one component."""
    names = [name for layer in tuner_layers(module) for name in layer.active_adapters]
    return [n for n in dict.fromkeys(names) if n in getattr(module, "peft_config", {})]


def _activate(module: nn.Module, names: Sequence[str]) -> None:
    for layer in tuner_layers(module):
        layer.set_adapter(list(names), inference_mode=True)


def list_adapters(pipe: Any) -> dict[str, list[str]]:
    """Names of all adapters (ordinary LoRAs too) by component."""
    found = {name: list(getattr(getattr(pipe, name), "peft_config", {})) for name in present(pipe)}
    return {name: adapters for name, adapters in found.items() if adapters}


def set_adapters(pipe: Any, names: str | Sequence[str], weights: float | Sequence[float] = 1.0) -> None:
    """Make exactly these adapters active, with these weights. Raises :class:`UserError` for an unknown name."""
    names = [names] if isinstance(names, str) else list(names)
    weights = [float(weights)] * len(names) if isinstance(weights, int | float) else list(weights)
    if len(weights) != len(names):
        raise UserError(f"{len(names)} adapters but {len(weights)} weights: give one weight each")
    known = {name for group in list_adapters(pipe).values() for name in group}
    for name in names:
        if name not in known:
            raise UserError(f"there is no adapter named {name!r} in the pipeline: {_names_hint(pipe)}")
    for part in present(pipe):
        module = getattr(pipe, part)
        _activate(module, names)
        for layer in tuner_layers(module):
            for name, weight in zip(names, weights, strict=True):
                layer.set_scale(name, weight)


def _names_hint(pipe: Any) -> str:
    known = sorted({name for group in list_adapters(pipe).values() for name in group})
    return f"it has {', '.join(known)}" if known else "it has none"


def delete_adapter(pipe: Any, adapter_name: str) -> None:
    """Remove an adapter from every component; layers left without adapters are taken out again."""
    if not any(adapter_name in names for names in list_adapters(pipe).values()):
        raise UserError(f"there is no adapter named {adapter_name!r} in the pipeline: {_names_hint(pipe)}")
    for part in present(pipe):
        module = getattr(pipe, part)
        if adapter_name in getattr(module, "peft_config", {}):
            for layer in list(tuner_layers(module)):
                layer.delete_adapter(adapter_name)
            del module.peft_config[adapter_name]
            _eject_empty(module)


def _eject_empty(module: nn.Module) -> None:
    for parent in list(module.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, NoraLayer) and not child.nora_delta:
                setattr(parent, child_name, child.base_layer)
    if not getattr(module, "peft_config", None) and not any(True for _ in tuner_layers(module)):
        module._hf_peft_config_loaded = False  # type: ignore[assignment]
