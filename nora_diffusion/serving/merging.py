"""Calls of a model by several pictures as one call of a larger batch, and its result as one for each picture.

The arguments of a call are tensors with one row for each row of the picture (two with guidance), numbers, and
dictionaries of such. Calls that differ in anything else, such as the size of the picture, cannot be merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

SAME = frozenset({"img_ids", "txt_ids"})
"""Tensors without rows: the positions of Flux, which all pictures of a size share."""
PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
"""Arguments that are compared. Others, such as lists of residuals, may have rows: calls with them are not merged."""


@dataclass(frozen=True, eq=False)
class Arguments:
    """The arguments of a call by position and by name, and its number of rows."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    rows: int

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        """Count the rows: the length of the first tensor that has a dimension."""
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim)
        return cls(tuple(args), dict(kwargs), len(next(tensors)))

    @cached_property
    def key(self) -> Any:
        """Calls with equal keys can be merged."""
        return _key("args", dict(enumerate(self.args))), _key("kwargs", self.kwargs)


def _key(name: Any, value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple((key, _key(key, value[key])) for key in sorted(value, key=str))
    if not isinstance(value, Tensor):
        return (type(value), value) if isinstance(value, PLAIN) else object()
    own = tuple(value.flatten().tolist()) if name in SAME else ()
    return tuple(value.shape[1:]), value.dtype, value.device, own


def merged(calls: Sequence[Arguments]) -> Arguments:
    """One call with the rows of all, in order. A tensor without dimensions, a timestep, becomes one value per row."""
    rows = [call.rows for call in calls]
    args = _merged("args", [dict(enumerate(call.args)) for call in calls], rows)
    kwargs = _merged("kwargs", [call.kwargs for call in calls], rows)
    return Arguments(tuple(args.values()), kwargs, sum(rows))


def _merged(name: Any, values: Sequence[Any], rows: Sequence[int]) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        return {key: _merged(key, [value[key] for value in values], rows) for key in first}
    if not isinstance(first, Tensor) or name in SAME:
        return first
    if first.ndim == 0:
        return torch.cat([value.expand(count) for value, count in zip(values, rows, strict=True)])
    return torch.cat(list(values))


def parted(result: Any, rows: Sequence[int]) -> list[Any]:
    """The result of a merged call for each of its calls: tensors by rows, in tuples, dictionaries and model outputs."""
    if isinstance(result, Tensor):
        return list(result.split(list(rows))) if result.ndim and len(result) == sum(rows) else [result] * len(rows)
    if isinstance(result, Mapping):  # the outputs of diffusers and transformers are dictionaries too
        items = {key: parted(value, rows) for key, value in result.items()}
        return [type(result)(**{key: own[i] for key, own in items.items()}) for i in range(len(rows))]
    if isinstance(result, tuple | list):
        columns = [parted(value, rows) for value in result]
        return [type(result)(column[i] for column in columns) for i in range(len(rows))]
    return [result] * len(rows)
