"""The state of any optimizer as tensors and JSON numbers, exactly: checkpoints hold no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Parameters = Mapping[str, nn.Parameter]
AVERAGE = "average"
"""The name beside an optimizer's own under which a checkpoint holds :class:`.averaging.Average`."""


def state_tensors(optimizer: torch.optim.Optimizer, parameters: Parameters) -> dict[str, Tensor]:
    """``{"<factor key>|<state key>": tensor}``."""
    return {
        f"{name}|{key}": value.detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def state_numbers(optimizer: torch.optim.Optimizer, parameters: Parameters) -> dict[str, Any]:
    """The rest: numbers of each factor (a step count) and of each group (Prodigy's ``d``); JSON keeps them exactly."""
    return {
        "factors": {
            name: numbers
            for name, parameter in parameters.items()
            if (numbers := _numbers(optimizer.state.get(parameter, {})))
        },
        "groups": [_numbers(group) for group in optimizer.param_groups],
    }


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    # The rate is the schedule's, and `initial_lr` the config's.
    return {k: v for k, v in values.items() if isinstance(v, bool | int | float) and k not in ("lr", "initial_lr")}


def restore_state(
    optimizer: torch.optim.Optimizer, parameters: Parameters, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Give every trained factor and every group back what the two functions above took."""
    states: dict[str, dict[str, Any]] = {name: dict(numbers.get("factors", {}).get(name, {})) for name in parameters}
    for key, value in tensors.items():
        name, _, part = key.rpartition("|")
        if part != AVERAGE:
            # AdamW keeps its step count on the CPU.
            states[name][part] = value if part == "step" else value.to(parameters[name].device)
    for name, parameter in parameters.items():
        if states[name]:
            optimizer.state[parameter] = states[name]
    for group, values in zip(optimizer.param_groups, numbers.get("groups", []), strict=False):
        group.update(values)
