"""Load files of other tools through their libraries: LoRAs by diffusers, a T5's, LoHa and LoKr by PEFT."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..adapters.tuner.guards import guard
from ..errors import UserError, first_line
from ..formats.adapter_info import AdapterInfo
from ..formats.foreign import Module, family_of, rank_of
from ..formats.foreign_updates import LoraSettings, Scales, fitted_modules, lora_settings
from ..formats.keys import Projection
from ..io.tensor_file import TensorFile
from ..io.tensors import Tensors, all_finite
from ..pipelines.components import Modules, refuse_merged, tuner_layers
from .active import active_adapters, delete_adapter, held, keeping_trained, set_active, unwrap_empty
from .foreign_embeddings import bundled_embeddings, load_embeddings, own_embedding
from .inject import all_or_nothing, check_new_name

Fitting = dict[Projection, tuple[Module, Tensors]]
TEXT_PROJECTION = "text_projection"
DOWN, UP, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector.weight"


def load_foreign(pipe: Any, modules: Modules, info: AdapterInfo, name: str, activate: bool, weight: float) -> int:
    """Load a file of another tool as the adapter ``name``, all or nothing; returns the number of tensors in it.

    Raises :class:`UserError` for another base, a wrong shape, NaN, and a file that the other library refuses.
    """
    with TensorFile(Path(info.path)) as reader:
        family = family_of(reader)
        if family == "embedding":
            load_embeddings(pipe, own_embedding(pipe, modules, reader))
        else:
            embeddings = bundled_embeddings(pipe, modules, reader)
            _load_layers(pipe, modules, reader, family, info, name, activate, weight)
            try:
                load_embeddings(pipe, embeddings)
            except BaseException:
                delete_adapter(pipe, name)
                raise
        return len(reader.entries)


def _load_layers(
    pipe: Any, modules: Modules, reader: TensorFile, family: str, info: AdapterInfo, name: str, activate: bool,
    weight: float,
) -> None:  # fmt: skip
    found = fitted_modules(modules, reader)
    check_new_name(pipe, modules, name, dict.fromkeys(component for component, _ in found))
    refuse_merged(modules)
    if any("diff" in own for _, own in found.values()):
        raise UserError(
            f"{info.path} holds whole updates (diff), which neither diffusers nor PEFT loads: convert it with "
            "`nora-diffusion import`"
        )
    if any("mid" in own for _, own in found.values()):
        raise UserError(
            f"{info.path} is {info.note} in Tucker form (lora_mid), which diffusers does not load: convert it with "
            "`nora-diffusion import`"
        )
    if family != "lora" and any("dora" in own for _, own in found.values()):
        raise UserError(
            f"{info.path} is {info.note} with magnitudes (dora_scale), which neither PEFT nor `nora-diffusion import` "
            "reads: load it with the tool that made it"
        )
    before = {component: active_adapters(module) for component, module in modules.items()}
    with ExitStack() as stack:
        stack.enter_context(_restored_on_error(modules, info.path, before))
        stack.enter_context(all_or_nothing(pipe, modules, name))
        stack.enter_context(warnings.catch_warnings())  # PEFT warns about a second adapter, which is normal use here
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        for module in modules.values():
            stack.enter_context(keeping_trained(module))
        if family != "lora":
            _inject(modules, reader, family, name, found)
        else:
            _load_lora(pipe, modules, name, _renamed(reader, found))
        _check_applied(modules, info.path, name, found)
        for component, module in modules.items():
            layers = [layer for layer in tuner_layers(module) if name in held(layer)]
            if layers:
                guard(module)
            set_active(module, [*before[component], name] if activate and layers else before[component])
            for layer in layers:
                if family == "lora":  # older diffusers set the alpha of all modules to the rank of one
                    layer.lora_alpha[name] = layer.r[name]
                layer.set_scale(name, weight)


@contextmanager
def _restored_on_error(modules: Modules, path: str, before: dict[str, list[str]]) -> Iterator[None]:
    """On an error of another library, remove the empty wrappers that it left, and raise a :class:`UserError`."""
    try:
        yield
    except BaseException as error:
        for component, module in modules.items():
            unwrap_empty(module)
            set_active(module, before[component])
        if isinstance(error, UserError) or not isinstance(error, Exception):
            raise
        raise UserError(
            f"diffusers or PEFT cannot load {path} ({first_line(error)[:200]}): convert it with `nora-diffusion import`"
        ) from error


def _check_applied(modules: Modules, path: str, name: str, found: Fitting) -> None:
    own = [modules[component] for component in dict.fromkeys(component for component, _ in found)]
    applied = sum(name in held(layer) for module in own for layer in tuner_layers(module))
    if applied != len(found):
        raise UserError(
            f"diffusers or PEFT applied only {applied} of the {len(found)} projections of {path}: convert it with "
            "`nora-diffusion import`"
        )


def _load_lora(pipe: Any, modules: Modules, name: str, tensors: dict[str, Tensors]) -> None:
    """Load a LoRA by diffusers, and by PEFT where diffusers' loader does not reach.

    That is a T5, any pipeline without a loader, and CLIP's text projection.
    """
    loadable = getattr(type(pipe), "_lora_loadable_modules", ())
    known = [c for c in tensors if c in loadable and TEXT_PROJECTION + DOWN not in tensors[c]]
    by_diffusers = {f"{c}.{key}": value for c in known for key, value in tensors[c].items()}
    if by_diffusers:  # not the file itself: diffusers drops dora_scale, and alphas and ranks that differ within a file
        pipe.load_lora_weights(by_diffusers, adapter_name=name)
    for component, own in tensors.items():
        if component not in known:
            _inject_lora(modules[component], name, own)


def _inject_lora(module: nn.Module, name: str, tensors: Tensors) -> None:
    """Load a LoRA of one component by PEFT, at scale 1."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    ranks = {key.removesuffix(DOWN): value.shape[0] for key, value in tensors.items() if key.endswith(DOWN)}
    r, pattern = max(ranks.values()), {f"^{re.escape(path)}": rank for path, rank in ranks.items()}
    config = LoraConfig(
        r=r, lora_alpha=r, rank_pattern=pattern, alpha_pattern=dict(pattern), inference_mode=True,
        target_modules="|".join(re.escape(path) for path in ranks),
        use_dora=any(key.endswith(MAGNITUDE) for key in tensors),
    )  # fmt: skip
    inject_adapter_in_model(config, module, name)
    set_peft_model_state_dict(module, tensors, name)
    module._hf_peft_config_loaded = True  # type: ignore[assignment]  # diffusers' flag


def _renamed(reader: TensorFile, found: Fitting) -> dict[str, Tensors]:
    """A LoRA's tensors by component under PEFT's keys, which have no scale: it is multiplied into ``B``."""
    scales = Scales(reader)
    renamed: dict[str, Tensors] = {}
    for (component, path), (module, factors) in found.items():
        scale, up, own = scales.of(module, factors), factors["up"], renamed.setdefault(component, {})
        own[path + DOWN] = factors["down"]
        # In fp32, so that the only rounding is the cast to the model's dtype.
        own[path + UP] = up if scale == 1 else up.float() * scale
        if "dora" in factors:
            own[path + MAGNITUDE] = _magnitude(reader, module, factors)
    for component, own in renamed.items():
        if damaged := next((key for key, value in own.items() if not all_finite(value)), None):
            raise UserError(f"{reader.path}: {damaged} holds NaN or infinity: the adapter is damaged")
        _check_magnitudes(reader, component, own)
    return renamed


def _check_magnitudes(reader: TensorFile, component: str, tensors: Tensors) -> None:
    """Raise :class:`UserError` if only some projections have one: PEFT would give the others one of its own."""
    with_one, total = (sum(key.endswith(end) for key in tensors) for end in (MAGNITUDE, DOWN))
    if 0 < with_one < total:
        raise UserError(
            f"{reader.path}: only {with_one} of the {total} projections of the {component} have a magnitude (DoRA), "
            "which diffusers and PEFT do not support: load it with the tool that made it"
        )


def _magnitude(reader: TensorFile, module: Module, factors: Tensors) -> Tensor:
    """DoRA's magnitude in diffusers' shape: ``[d_out]``, or ``[1, d_out, 1, 1]`` for a convolution."""
    m, up = factors["dora"], factors["up"]
    by_row = m.numel() == up.shape[0] and ("lora_magnitude" in module.keys["dora"] or m.shape[0] == up.shape[0])
    if not by_row and m.numel() != factors["down"].shape[1]:
        raise UserError(
            f"{reader.path}: the magnitude of {module.name} has the shape {tuple(m.shape)}, which fits neither its "
            "rows nor its columns: copy it again"
        )
    if not by_row:
        raise UserError(
            f"{reader.path} is a DoRA that diffusers and PEFT do not support: {module.name} has one magnitude per "
            "input channel; load it with the tool that made it"
        )
    return m.flatten() if up.ndim == 2 else m.reshape(1, -1, 1, 1)


def _inject(modules: Modules, reader: TensorFile, family: str, name: str, found: Fitting) -> None:
    """Load LoHa and LoKr by PEFT's tuners: build a config from the factors' shapes, inject, copy the values."""
    from peft import inject_adapter_in_model

    for component in dict.fromkeys(component for component, _ in found):
        entries = {path: entry for (c, path), entry in found.items() if c == component}
        module = modules[component]
        inject_adapter_in_model(_config(reader, family, entries), module, name)
        module._hf_peft_config_loaded = True  # type: ignore[assignment]  # diffusers' flag
        layers = {
            path.replace(".base_layer", ""): layer for path, layer in module.named_modules() if _holds(layer, name)
        }
        for path, (source, factors) in entries.items():
            _fill(reader, layers[path], name, source, factors)


def _holds(layer: nn.Module, name: str) -> bool:
    return isinstance(layer, BaseTunerLayer) and name in held(layer)


def _config(reader: TensorFile, family: str, entries: dict[str, tuple[Module, Tensors]]) -> Any:
    from peft import LoHaConfig, LoKrConfig

    scales = Scales(reader)
    ranks = {path: _peft_rank(factors) for path, (_, factors) in entries.items()}
    r = max(ranks.values())
    alphas = {path: scales.of(module, factors) * ranks[path] for path, (module, factors) in entries.items()}
    names = {factor for _, factors in entries.values() for factor in factors}
    shared = {
        "r": r,
        "alpha": r,
        "target_modules": "|".join(re.escape(path) for path in entries),
        "rank_pattern": {f"^{re.escape(path)}": rank for path, rank in ranks.items()},
        "alpha_pattern": {f"^{re.escape(path)}": alpha for path, alpha in alphas.items()},
        "use_effective_conv2d": bool(names & {"hada_t1", "lokr_t2"}),
        "inference_mode": True,
    }
    if family == "loha":
        return LoHaConfig(**shared)
    factor = lora_settings(reader).get("", LoraSettings()).decompose_factor
    return LoKrConfig(**shared, decompose_both="lokr_w1_a" in names, decompose_factor=-1 if factor is None else factor)


def _peft_rank(factors: Tensors) -> int:
    """The rank at which PEFT creates factors of these shapes; it creates an undecomposed ``w2`` at a large rank."""
    shapes = {factor: value.shape for factor, value in factors.items()}
    return rank_of(shapes) or max(shapes["lokr_w2"][:2])


def _fill(reader: TensorFile, layer: Any, name: str, source: Module, factors: Tensors) -> None:
    own = {table: getattr(layer, table)[name] for table in layer.adapter_layer_names if name in getattr(layer, table)}
    shapes = {factor: tuple(value.shape) for factor, value in factors.items() if factor != "alpha"}
    if shapes != {factor: tuple(value.shape) for factor, value in own.items()}:
        raise UserError(
            f"{reader.path}: PEFT has no layer for the factors of {source.name}: convert it with "
            "`nora-diffusion import`"
        )
    for factor, parameter in own.items():
        parameter.data.copy_(factors[factor])
