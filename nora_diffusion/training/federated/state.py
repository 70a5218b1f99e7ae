"""The progress of a federation, stored after each round."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...formats.adapter_file import FILE_NAME
from ...io.files import write_atomic
from ...io.untrusted import parse_json
from ..settings.config import TrainConfig
from .settings import Federation

STATE = "federation.json"


@dataclass
class Round:
    """A finished round.

    ``losses``: of the clients that took part; ``left_out``: why the others did not. ``error``: relative, of the
    aggregated update against the exact mean. ``down_bytes``, ``up_bytes``: sent to and by all clients that took part.
    """

    losses: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    error: float = 0.0
    down_bytes: int = 0
    up_bytes: int = 0

    @property
    def loss(self) -> float:
        """The mean loss of the clients that took part."""
        return sum(self.losses.values()) / len(self.losses)


@dataclass
class State:
    """The progress of a federation, as it is stored. ``basis_bytes``: the frozen factors, sent once to each client."""

    identity: dict[str, Any]
    seed: int
    basis_bytes: int = 0
    rounds: list[Round] = field(default_factory=list)


def read_state(federation: Federation, configs: Mapping[str, TrainConfig]) -> State:
    """The stored state of the folder, or a new one. Raises :class:`UserError` if it is that of another federation."""
    file, identity = federation.folder / STATE, federation.identity(configs)
    if not file.exists():
        if (federation.folder / FILE_NAME).exists():
            raise UserError(f"{federation.folder} already holds an adapter: choose another --output_dir")
        return State(identity, federation.seed())
    try:
        stored = parse_json(file.read_bytes())
        state = State(**{**stored, "rounds": [Round(**values) for values in stored["rounds"]]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}): start again in another --output_dir") from error
    if changes := _changes(state.identity, identity):
        raise UserError(
            f"{federation.folder} holds a federation with other settings ({', '.join(changes)}): restore them, or "
            "choose another --output_dir"
        )
    return state


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    if before.get("aggregation") != now["aggregation"]:
        return ["aggregation"]
    clients = before.get("clients", {})
    if clients.keys() != now["clients"].keys():
        return ["clients"]
    return sorted({key for name, own in now["clients"].items() for key in own if clients[name].get(key) != own[key]})


def write_state(folder: Path, state: State) -> None:
    """Write the state of a federation."""
    write_atomic(folder / STATE, json.dumps(asdict(state), indent=1))
