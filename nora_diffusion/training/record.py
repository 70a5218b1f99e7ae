"""A finished run as results files describe it: its settings without paths, its size and its time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.folder import find_images
from ..errors import UserError
from ..formats.adapter_file import inspect_adapter
from ..formats.adapter_info import AdapterInfo
from ..io.files import sha256
from ..io.run_layout import CONFIG
from ..io.yaml_text import read_yaml
from ..results.schema import Images
from .planning.rundir import RunFolder
from .settings.config import TrainConfig, settings

GROUPS = ("adapter", "training", "optimizer")
OWN = ("seed", "learning_rate", "max_train_steps", "basis_from")
"""Settings that a row has itself, or that name a file of this machine."""


@dataclass(frozen=True)
class RunRecord:
    """An adapter and, if it lies in the folder of its run, that run's settings. ``seconds``: of all steps."""

    info: AdapterInfo
    config: TrainConfig | None
    seconds: float

    @property
    def rate(self) -> float | None:
        """The learning rate, if it is known."""
        return None if self.config is None else self.config.learning_rate

    @property
    def steps(self) -> int:
        """The steps that were trained; the adapter may be that of an earlier one."""
        return (self.config and self.config.max_train_steps) or self.info.step

    @property
    def settings(self) -> dict[str, Any]:
        """What was set: of an adapter without its run, method and ranks only."""
        if not self.info.is_ours:
            return {"method": self.info.kind}
        if self.config is None:
            return {"method": self.info.method, "rank": self.info.r, "inner_rank": self.info.inner_r}
        return settings_of(self.config)

    @property
    def photos(self) -> Images | None:
        """The photos that it was trained on, if they are still where they were."""
        folder = self.config and self.config.instance_data_dir
        try:
            return Images.of([sha256(path) for path in find_images(Path(folder).expanduser())]) if folder else None
        except (OSError, UserError):
            return None


def read_record(adapter: str | Path) -> RunRecord:
    """The record of an adapter file or folder. Raises :class:`UserError` if there is none."""
    info = inspect_adapter(adapter)
    folder = Path(info.path).parent
    seconds = round(sum(seconds for _, _, seconds in RunFolder(folder).steps()), 3)
    return RunRecord(info, _config(folder / CONFIG), seconds)


def _config(file: Path) -> TrainConfig | None:
    """The settings in a run's file, if this release knows all of them."""
    try:
        return TrainConfig.from_mapping(read_yaml(file, "config")) if file.is_file() else None
    except UserError:
        return None


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """The settings of method and training that differ from the defaults, without those of one run or machine."""
    kept = [f for f in settings() if f.metadata["group"] in GROUPS and "free" not in f.metadata["tags"]]
    values = {f.name: getattr(config, f.name) for f in kept if f.name not in OWN}
    defaults = {f.name: f.default for f in kept}
    return {"method": config.method} | {name: v for name, v in values.items() if v != defaults[name]}
