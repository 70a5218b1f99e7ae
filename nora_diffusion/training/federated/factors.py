"""The trained factors of an adapter as the bytes that travel, and the mean of several clients' factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ...errors import UserError
from ...formats.adapter_file import inspect_adapter, read_tensors
from ...formats.adapter_info import AdapterInfo
from ...formats.adapter_writing import write_adapter
from ...formats.compacting import narrow_names
from ...formats.keys import factors_by_projection, file_key, is_frozen
from ...io.tensors import Tensors, all_finite
from .aggregation import AGGREGATIONS, mean, squared_errors
from .settings import Aggregation


@dataclass(frozen=True)
class Split:
    """An adapter file as its description, its frozen factors and its trained ones."""

    info: AdapterInfo
    frozen: Tensors
    trained: Tensors


def split(path: Path) -> Split:
    """Read an adapter file. Raises :class:`UserError` if it is damaged."""
    info = inspect_adapter(path)
    tensors = read_tensors(info)
    frozen = {key: value for key, value in tensors.items() if is_frozen(key)}
    return Split(info, frozen, {key: value for key, value in tensors.items() if key not in frozen})


def join(folder: Path, info: AdapterInfo, frozen: Tensors, trained: Tensors) -> Path:
    """Write an adapter file."""
    return write_adapter(folder, {**frozen, **trained}, info)


def packed(tensors: Tensors) -> bytes:
    """The tensors as the bytes of a safetensors file."""
    return save({key: value.contiguous() for key, value in sorted(tensors.items())})


def unpacked(content: bytes, like: Mapping[str, Tensor], owner: str) -> Tensors:
    """The tensors of :func:`packed`; ``owner`` may send anything.

    Raises :class:`UserError` unless they are finite and have the names, shapes and dtypes of ``like``.
    """
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise UserError(f"{owner} sent no safetensors ({error})") from error
    shapes = [{k: (v.shape, v.dtype) for k, v in known.items()} for known in (tensors, like)]
    if shapes[0] != shapes[1]:
        raise UserError(f"{owner} sent other factors than it was given: all clients need the same method and ranks")
    if not all(map(all_finite, tensors.values())):
        raise UserError(f"{owner} sent NaN or infinity: lower --learning_rate")
    return tensors


def aggregated(updates: Sequence[Tensors], weights: Sequence[float], how: Aggregation) -> tuple[Tensors, float]:
    """The factors of all clients as one set, and its relative error ``||dW_sent - dW|| / ||dW||`` over all layers.

    ``weights``: of the clients, with the sum 1. Every pair is aggregated as ``how`` says, all other factors (a
    magnitude, a dense core, a router) are averaged. The error is that of the pairs alone, 0 without any.
    """
    projections = [factors_by_projection(update) for update in updates]
    result: Tensors = {}
    lost = total = 0.0
    for (component, path), first in projections[0].items():
        own = [each[component, path] for each in projections]
        names = narrow_names(first)
        is_pair = all(name in first for name in names)
        values = {name: mean([f[name] for f in own], weights) for name in first if not (is_pair and name in names)}
        if is_pair:
            pairs = [(factors[names[0]], factors[names[1]]) for factors in own]
            pair = AGGREGATIONS[how](pairs, weights)
            values |= dict(zip(names, pair, strict=True))
            error, norm = squared_errors(pair, pairs, weights)
            lost, total = lost + error, total + norm
        result |= {file_key(component, path, name): value.to(first[name].dtype) for name, value in values.items()}
    return result, (lost / total) ** 0.5 if total else 0.0
