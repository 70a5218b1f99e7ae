"""Many subjects at once: a pipeline call in which every row of the batch has adapters of its own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..adapters import NoraLayer
from ..adapters.tuner.mixed_rows import RowPlan, serve_rows
from ..errors import UserError
from ..pipelines.components import DENOISERS, Modules, components, refuse_merged, refuse_offloaded, tuner_layers
from .active import check_finite, held, require_adapter
from .locking import exclusive

Row = str | tuple[str, float] | None
RowSpec = Row | Sequence[Row]
BASE = "__base__"
"""PEFT's name for a row without an adapter."""


@contextmanager
def mixed_batch(pipe: Any, rows: Sequence[RowSpec], weights: Sequence[float] | float | None = None) -> Iterator[None]:
    """``with mixed_batch(pipe, ["dog", "cat", None]): pipe([...])``: one pass, another subject (or none) per row.

    ``rows``: for each prompt an adapter's name, ``(name, weight)``, a list of those, or None for the base alone.
    ``weights``: for rows given as bare names (default 1). The active set and the weights of ``set_adapters`` are left
    alone and do not count inside; a scale given to the pipeline's call (``cross_attention_kwargs``) does.

    Every row equals its solo run: guidance's negative row uses its row's adapters, rows repeat by
    ``num_images_per_prompt``, text encoders are included. A direct call of the denoiser takes as many rows, or
    ``[negative..., positive...]``. Adapters with equal frozen bases are served by one product, others by their rows.
    Ordinary LoRAs are served by PEFT: one a row, with one weight in all rows.

    Other threads that change the pipeline or serve a batch wait until the context ends (:func:`.exclusive`).
    Raises :class:`UserError` for an unknown name, or when something is merged or disabled.
    """
    specs = _parse(rows, weights)
    with exclusive(pipe), ExitStack() as stack:
        modules = components(pipe)
        _check(modules, specs)
        for component, module in modules.items():
            plan = RowPlan(specs)
            stack.enter_context(serve_rows(module, plan))
            stack.enter_context(_serve_loras(module, component, plan))
            if component in DENOISERS:
                stack.enter_context(_counting(pipe, plan))
        yield


def _check(modules: Modules, specs: Sequence[Mapping[str, float]]) -> None:
    names = {name for spec in specs for name in spec}
    for name in sorted(names):
        require_adapter(modules, name)
    refuse_merged(modules)
    refuse_offloaded(modules)
    for spec in specs:
        for name, weight in spec.items():
            check_finite(name, weight)
    for component, module in modules.items():
        _refuse(module, component, names)


def _parse(rows: Sequence[RowSpec], weights: Sequence[float] | float | None) -> list[dict[str, float]]:
    if isinstance(rows, str) or not isinstance(rows, Sequence):
        raise UserError(f"mixed_batch takes a list with one entry for each prompt, not {rows!r}")
    if isinstance(weights, int | float) or weights is None:
        weights = [1.0 if weights is None else float(weights)] * len(rows)
    if not rows or len(weights) != len(rows):
        raise UserError(f"{len(rows)} rows but {len(weights)} weights: give at least one row, and one weight each")
    return [_spec(row, float(weight)) for row, weight in zip(rows, weights, strict=True)]


def _spec(row: RowSpec, weight: float) -> dict[str, float]:
    if row is None:
        return {}
    if isinstance(row, str):
        return {row: weight}
    if isinstance(row, tuple) and len(row) == 2 and isinstance(row[0], str) and isinstance(row[1], int | float):
        return {row[0]: float(row[1])}
    if isinstance(row, Mapping) or not isinstance(row, Sequence):
        raise UserError(f"a row of mixed_batch is a name, (name, weight), a list of those or None, not {row!r}")
    spec: dict[str, float] = {}
    for single in row:
        if single is not None and not isinstance(single, str | tuple):
            raise UserError(f"{single!r} within a row is no name and no (name, weight)")
        for name, value in _spec(single, weight).items():
            if name in spec:
                raise UserError(f"a row names {name!r} twice: give it once, with the weight you mean")
            spec[name] = value
    return spec


def _refuse(model: nn.Module, part: str, names: set[str]) -> None:
    """Refuse what PEFT's other tuners cannot do by rows."""
    for layer in tuner_layers(model):
        if layer.disable_adapters:
            raise UserError(f"the adapters of the {part} are disabled: call enable_lora() first")
        asked = set(layer.active_adapters) | names
        if not isinstance(layer, NoraLayer | LoraLayer) and held(layer) & asked:
            raise UserError(
                f"the {part} has an adapter of the kind {type(layer).__name__}, which cannot be mixed by rows: "
                "deactivate it with set_adapters, or delete it"
            )
        if isinstance(layer, LoraLayer) and any(getattr(layer, "use_dora", {}).get(name) for name in names):
            raise UserError("a LoRA with a magnitude (DoRA) cannot be mixed by rows: PEFT does not support it")


@contextmanager
def _serve_loras(model: nn.Module, part: str, plan: RowPlan) -> Iterator[None]:
    """Have ordinary LoRAs follow the plan, by PEFT's ``adapter_names``."""
    layers = [layer for layer in tuner_layers(model) if isinstance(layer, LoraLayer)]
    mine = {name for name in plan.names if any(name in held(layer) for layer in layers)}
    weights: dict[str, float] = {}
    for spec in plan.specs:
        here = [name for name in spec if name in mine]
        if len(here) > 1:
            raise UserError(f"{' and '.join(here)} are ordinary LoRAs of the {part}: a row can have only one of those")
        for name in here:
            if weights.setdefault(name, spec[name]) != spec[name]:
                raise UserError(f"{name!r} is an ordinary LoRA: it must have the same weight in all rows")

    def choose(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        chosen = [next((name for name in plan.specs[spec] if name in mine), BASE) for spec in plan.batch]
        return args, kwargs | {"adapter_names": chosen}

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(choose, with_kwargs=True).remove)
            stack.callback(_restore, layer, list(layer.active_adapters), dict(layer.scaling))
            layer._active_adapter = list(mine)  # so that a scale given to the pipeline's call reaches them
            for name, weight in weights.items():
                layer.set_scale(name, weight)
        yield


def _restore(layer: Any, active: list[str], scaling: dict[str, float]) -> None:
    layer._active_adapter = active
    layer.scaling.update({name: value for name, value in scaling.items() if name in layer.scaling})


@contextmanager
def _counting(pipe: Any, plan: RowPlan) -> Iterator[None]:
    """Count prompts and learn ``num_images_per_prompt`` of each call of the pipeline, as ``encode_prompt`` is told."""
    encode, finish = pipe.encode_prompt, pipe.maybe_free_model_hooks
    before = {name: value for name, value in vars(pipe).items() if name in ("encode_prompt", "maybe_free_model_hooks")}
    signature = inspect.signature(encode)

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        told = signature.bind(*args, **kwargs).arguments
        plan.check_prompts(_prompts(told.get("prompt"), told.get("prompt_embeds")))
        plan.repeats = int(told.get("num_images_per_prompt") or 1)
        return encode(*args, **kwargs)

    def maybe_free_model_hooks() -> None:
        plan.repeats = 1  # the end of every pipeline's call
        finish()

    pipe.encode_prompt, pipe.maybe_free_model_hooks = encode_prompt, maybe_free_model_hooks
    try:
        yield
    finally:
        del pipe.encode_prompt, pipe.maybe_free_model_hooks
        vars(pipe).update(before)


def _prompts(prompt: str | list[str] | None, embeds: Tensor | None) -> int:
    """How many prompts a pipeline was given, as texts or embedded."""
    if prompt is None:
        return 0 if embeds is None else len(embeds)
    return 1 if isinstance(prompt, str) else len(prompt)
