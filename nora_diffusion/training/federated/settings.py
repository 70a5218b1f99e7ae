"""The settings of a federated training, and its clients."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ...adapters.presets import default_axes, is_routed
from ...errors import UserError
from ..settings.config import TrainConfig, settings, tagged
from ..settings.defaults import with_defaults
from ..settings.listing import read_subjects

Aggregation = Literal["average", "exact", "fair"]
"""How the factors of the clients are averaged (:mod:`.aggregation`)."""
ALIKE = ("base", "adapter")
"""Groups of settings in which all clients must agree."""


@dataclass(frozen=True)
class Federation:
    """``rounds`` of local training by the clients of a YAML list, each followed by an aggregation.

    ``clients``: the list has the form of ``--subjects``: a name, a photo folder and a prompt for each client.
    ``training``: the settings of a client's training in one round; ``output_dir`` is the folder of the federation.
    ``address``: of a Ray cluster (default: one is started on this machine).
    """

    clients: str
    training: TrainConfig
    rounds: int = 3
    aggregation: Aggregation = "fair"
    address: str | None = None

    @property
    def folder(self) -> Path:
        """The folder of the federation."""
        return self.training.folder

    def configs(self) -> dict[str, TrainConfig]:
        """The settings of each client, by name, with all defaults but the seed.

        Raises :class:`UserError` for settings that are invalid, that differ between clients and must not, or that do
        not go with an aggregation.
        """
        if self.rounds < 1:
            raise UserError(f"--rounds {self.rounds} is too few: give 1 or more")
        listed = read_subjects(replace(self.training, subjects=self.clients))
        found = {name: with_defaults(config) for name, config in listed.items()}
        first, *others = found.values()
        alike = [f.name for f in settings() if f.metadata["group"] in ALIKE and "own" not in f.metadata["tags"]]
        for name in alike:
            if any(getattr(other, name) != getattr(first, name) for other in others):
                raise UserError(f"{self.clients}: {name} must be the same for all clients: give it as a flag, --{name}")
        _check(first, self.aggregation)
        return found

    def identity(self, configs: Mapping[str, TrainConfig]) -> dict[str, Any]:
        """What must be equal when the federation continues; ``rounds`` may grow."""
        free = {*tagged("free"), "seed"}
        own = {
            name: {key: value for key, value in config.to_dict().items() if key not in free}
            for name, config in configs.items()
        }
        found: dict[str, Any] = json.loads(json.dumps({"aggregation": self.aggregation, "clients": own}))
        return found

    def seed(self) -> int:
        """The seed of the whole federation: the given one, or a new one."""
        return secrets.randbelow(2**31) if self.training.seed is None else self.training.seed


def _check(config: TrainConfig, aggregation: Aggregation) -> None:
    method = config.method
    if aggregation != "average" and (is_routed(method) or (config.blocks or 1) > 1):
        raise UserError(
            f"--aggregation {aggregation} needs one pair of factors for each layer, which {method} does not have: use "
            "--aggregation average"
        )
    if default_axes(method).rank_mask and aggregation == "exact":
        raise UserError(
            f"--aggregation exact orders the ranks anew, which {method} orders by importance: use fair or average"
        )
    if config.strategy in ("chain", "reslora"):
        raise UserError(f"--strategy {config.strategy} changes the ranks, which clients must keep: leave it out")
    given = {
        "rank_allocation": "uniform", "calibration": "generic", "train_text_encoder_ti": False, "start_from": None,
        "push_to_hub": False, "export": None,
    }  # fmt: skip
    for name, default in given.items():
        if getattr(config, name) != default:
            raise UserError(f"--{name} is not possible when clients train in rounds: leave it out")
