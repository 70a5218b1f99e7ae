"""Mixed batches: a pipeline call in which each row of the batch uses its own adapters."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..adapters import NoraLayer
from ..adapters.tuner.mixed_rows import serve_rows
from ..adapters.tuner.peft_interface import check_weight
from ..adapters.tuner.row_plan import RowPlan
from ..errors import UserError, quoted
from ..pipelines.components import (
    Modules,
    components,
    named_tuner_layers,
    refuse_merged,
    refuse_offloaded,
    tuner_layers,
)
from ..pipelines.names import DENOISERS
from .active import held, per_entry, require_adapter, restore_weights
from .locking import exclusive

Row = str | tuple[str, float] | None
RowSpec = Row | Sequence[Row]
WRAPPED = ("encode_prompt", "maybe_free_model_hooks")
"""Methods that a pipeline object has of its own inside a mixed batch."""
BASE = "__base__"
"""PEFT's name for a row without an adapter."""


@contextmanager
def mixed_batch(pipe: Any, rows: Sequence[RowSpec], weights: Sequence[float] | float | None = None) -> Iterator[None]:
    """``with mixed_batch(pipe, ["dog", "cat", None]): pipe([...])``: one batch with other adapters (or none) per row.

    ``rows``: per prompt, an adapter name, ``(name, weight)``, a list of those, or None for the base alone.
    ``weights``: for rows given as plain names (default 1). The active adapters and weights of ``set_adapters`` have no
    effect inside the context and do not change; a scale passed to the pipeline call (``cross_attention_kwargs``) works.

    Each row equals a run of its own: the negative row of guidance uses the adapters of its row, rows repeat by
    ``num_images_per_prompt``, and text encoders are included. A direct call of the denoiser takes as many rows as
    ``rows`` has, or twice as many: ``[negative..., positive...]``. Adapters with equal frozen bases are computed in one
    product, other adapters for their rows. Ordinary LoRAs are computed by PEFT: at most one per row, and each with one
    weight in all rows.

    Other threads that change the pipeline or start a mixed batch wait until the context ends (:func:`.exclusive`).
    Raises :class:`UserError` for an unknown name, and while adapters are merged or disabled.
    """
    specs = _parse(rows, weights)
    with exclusive(pipe), ExitStack() as stack:
        modules = components(pipe)
        _check(modules, specs)
        for component, module in modules.items():
            plan = RowPlan(specs)
            stack.enter_context(serving(pipe, component, module, plan))
            stack.enter_context(_serve_loras(module, component, plan))
        yield


@contextmanager
def serving(pipe: Any, component: str, module: nn.Module, plan: RowPlan) -> Iterator[None]:
    """Apply a plan in one component of a pipeline; that of the denoiser learns what each pipeline call asks for."""
    with serve_rows(module, plan, named_tuner_layers(module)), ExitStack() as stack:
        if component in DENOISERS:
            stack.enter_context(_reading_calls(pipe, plan))
        yield


def _check(modules: Modules, specs: Sequence[Mapping[str, float]]) -> None:
    names = {name for spec in specs for name in spec}
    for name in sorted(names):
        require_adapter(modules, name)
    refuse_merged(modules)
    refuse_offloaded(modules)
    for component, module in modules.items():
        _refuse(module, component, names)


def _parse(rows: Sequence[RowSpec], weights: Sequence[float] | float | None) -> list[dict[str, float]]:
    if isinstance(rows, str) or not isinstance(rows, Sequence):
        raise UserError(f"mixed_batch takes a list with one entry per prompt, not {quoted(rows)}")
    own = per_entry(1.0 if weights is None else weights, len(rows))
    if not rows or len(own) != len(rows):
        raise UserError(f"{len(rows)} rows but {len(own)} weights: give at least one row, and one weight per row")
    return [_spec(row, check_weight("a row", weight)) for row, weight in zip(rows, own, strict=True)]


def _spec(row: RowSpec, weight: float) -> dict[str, float]:
    if row is None:
        return {}
    if isinstance(row, str):
        return {row: weight}
    if isinstance(row, tuple) and len(row) == 2 and isinstance(row[0], str) and not isinstance(row[1], str | tuple):
        return {row[0]: check_weight(*row)} if row[1] is not None else {row[0]: weight}
    if isinstance(row, Mapping) or not isinstance(row, Sequence):
        raise UserError(f"a row of mixed_batch is a name, (name, weight), a list of those or None, not {quoted(row)}")
    spec: dict[str, float] = {}
    for single in row:
        if single is not None and not isinstance(single, str | tuple):
            raise UserError(f"{quoted(single)} in a row is neither a name nor (name, weight)")
        for name, value in _spec(single, weight).items():
            if name in spec:
                raise UserError(f"a row lists {name!r} twice: list it once, with its weight")
            spec[name] = value
    return spec


def _refuse(module: nn.Module, component: str, names: set[str]) -> None:
    """Refuse disabled adapters, and those of other PEFT tuners, which do not support mixed batches."""
    for layer in tuner_layers(module):
        if layer.disable_adapters:
            raise UserError(f"the adapters of the {component} are disabled: call enable_lora() first")
        if not isinstance(layer, NoraLayer | LoraLayer) and held(layer) & (set(layer.active_adapters) | names):
            raise UserError(
                f"the {component} has a {type(layer).__name__} adapter, which mixed_batch does not support: "
                "deactivate it with set_adapters, or delete it"
            )
        if isinstance(layer, LoraLayer) and any(getattr(layer, "use_dora", {}).get(name) for name in names):
            raise UserError("mixed_batch cannot use a LoRA with a magnitude (DoRA): PEFT does not support it")


@contextmanager
def _serve_loras(module: nn.Module, component: str, plan: RowPlan) -> Iterator[None]:
    """Apply the plan to ordinary LoRAs, by PEFT's ``adapter_names``."""
    layers = [layer for layer in tuner_layers(module) if isinstance(layer, LoraLayer)]
    loras = set(plan.names) & {name for layer in layers for name in held(layer)}
    weights: dict[str, float] = {}
    for spec in plan.specs:
        used = [name for name in spec if name in loras]
        if len(used) > 1:
            raise UserError(f"{' and '.join(used)} are ordinary LoRAs of the {component}: a row can use only one")
        for name in used:
            if weights.setdefault(name, spec[name]) != spec[name]:
                raise UserError(f"{name!r} is an ordinary LoRA: it must have the same weight in all rows")

    def choose(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        chosen = [next((name for name in plan.specs[spec] if name in loras), BASE) for spec in plan.batch]
        return args, kwargs | {"adapter_names": chosen}

    with ExitStack() as stack:
        for layer in layers:
            if loras:
                stack.callback(layer.register_forward_pre_hook(choose, with_kwargs=True).remove)
            stack.callback(restore_weights, layer, list(layer.active_adapters), dict(layer.scaling))
            layer._active_adapter = list(loras)  # so that a scale passed to the pipeline call applies to them
            for name, weight in weights.items():
                layer.set_scale(name, weight)
        yield


@contextmanager
def _reading_calls(pipe: Any, plan: RowPlan) -> Iterator[None]:
    """Check the number of prompts of each pipeline call, and read its ``num_images_per_prompt``.

    Both are arguments of ``encode_prompt``, which is wrapped on the pipeline object inside the context;
    ``maybe_free_model_hooks``, which ends every call, is wrapped to reset the plan.
    """
    encode, finish = pipe.encode_prompt, pipe.maybe_free_model_hooks
    before = {name: value for name, value in vars(pipe).items() if name in WRAPPED}
    signature = inspect.signature(encode)

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        plan.check_prompts(_count_prompts(arguments.get("prompt"), arguments.get("prompt_embeds")))
        plan.repeats = int(arguments.get("num_images_per_prompt") or 1)
        plan.read_prompts(arguments.get("prompt"))
        return encode(*args, **kwargs)

    def maybe_free_model_hooks() -> None:
        plan.repeats = 1
        finish()

    pipe.encode_prompt, pipe.maybe_free_model_hooks = encode_prompt, maybe_free_model_hooks
    try:
        yield
    finally:
        del pipe.encode_prompt, pipe.maybe_free_model_hooks
        vars(pipe).update(before)


def _count_prompts(prompt: str | list[str] | None, embeds: Tensor | None) -> int:
    if prompt is None:
        return 0 if embeds is None else len(embeds)
    return 1 if isinstance(prompt, str) else len(prompt)
