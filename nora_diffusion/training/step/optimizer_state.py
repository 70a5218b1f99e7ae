"""Exact optimizer state as tensors and JSON numbers, so that checkpoints need no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Parameters = Mapping[str, nn.Parameter]
AVERAGE = "average"
"""State key of :class:`.averaging.Average` in a checkpoint, next to those of the optimizer."""


def state_tensors(optimizer: torch.optim.Optimizer, parameters: Parameters) -> dict[str, Tensor]:
    """Tensors of the optimizer state: ``{"<file key>|<state key>": tensor}``."""
    return {
        f"{name}|{key}": value.detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def state_numbers(optimizer: torch.optim.Optimizer, parameters: Parameters) -> dict[str, Any]:
    """Numbers of the optimizer state: of each factor (a step count) and group (Prodigy's ``d``); exact in JSON."""
    return {
        "factors": {
            name: numbers
            for name, parameter in parameters.items()
            if (numbers := _numbers(optimizer.state.get(parameter, {})))
        },
        "groups": [_numbers(group) for group in optimizer.param_groups],
    }


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    # `lr` is restored by the schedule, `initial_lr` from the config.
    return {k: v for k, v in values.items() if isinstance(v, bool | int | float) and k not in ("lr", "initial_lr")}


def restore_state(
    optimizer: torch.optim.Optimizer, parameters: Parameters, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Restore the state from :func:`state_tensors` and :func:`state_numbers`."""
    states: dict[str, dict[str, Any]] = {name: dict(numbers.get("factors", {}).get(name, {})) for name in parameters}
    for key, value in tensors.items():
        name, _, state_key = key.rpartition("|")
        if state_key != AVERAGE and name in states:
            # AdamW keeps its step count on the CPU.
            states[name][state_key] = value if state_key == "step" else value.to(parameters[name].device)
    for name, parameter in parameters.items():
        if states[name]:
            optimizer.state[parameter] = states[name]
    for group, values in zip(optimizer.param_groups, numbers.get("groups", []), strict=False):
        group.update(values)
