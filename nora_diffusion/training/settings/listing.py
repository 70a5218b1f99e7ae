"""Reads the list of subjects, ``--subjects subjects.yaml``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...io.yaml_text import read_yaml
from .checks import check_config
from .config import TrainConfig, settings_by_name, tagged


def read_subjects(config: TrainConfig) -> dict[str, TrainConfig]:
    """Config of each subject in the list, by name.

    Settings of an entry override ``config``. ``name`` is the subject's folder in ``output_dir`` (default: the name of
    ``instance_data_dir``). Raises :class:`UserError` for invalid or duplicate names, settings that all subjects must
    share, and uploads of two subjects to one repository.
    """
    configs: dict[str, TrainConfig] = {}
    own = ("name", *tagged("own"))
    path = Path(config.subjects or "").expanduser()
    for number, values in enumerate(_entries(path), start=1):
        name = str(values.pop("name", "") or Path(str(values.get("instance_data_dir", ""))).name)
        entry = f"subject {number} of {path}"
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(
                f"{entry}: {name!r} is not a valid folder name: give a 'name' of letters, digits, '-' and '_'"
            )
        if name.casefold() in {known.casefold() for known in configs}:
            raise UserError(f"{entry}: the name {name!r} is used twice: give each subject its own 'name'")
        shared = [key for key in values if (key not in own if config.joint else key in tagged("shared"))]
        if shared:
            raise UserError(f"{entry}: {shared[0]} must be the same for all subjects: give it as a flag, --{shared[0]}")
        try:
            own_config = TrainConfig.from_mapping(values)
            given = {settings_by_name()[key].name for key in values}
            changes = {key: getattr(own_config, key) for key in given}
            single: dict[str, Any] = {"subjects": None, "joint": False, "engine": "local", "address": None}
            configs[name] = replace(config, **changes, **single, output_dir=str(config.folder / name))
            check_config(configs[name])
        except UserError as error:
            raise UserError(f"{entry} ({name}): {error}") from error
    if not config.joint:
        _check_uploads(path, configs)
    return configs


def _entries(path: Path) -> list[dict[str, Any]]:
    entries = read_yaml(path, "list")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(
            f"{path} must be a YAML list of subjects: each starts with '- key: value', further keys follow below"
        )
    return [{str(key): value for key, value in entry.items()} for entry in entries]


def _check_uploads(path: Path, configs: Mapping[str, TrainConfig]) -> None:
    """Raise :class:`UserError` if two subjects would be uploaded to one repository."""
    owners: dict[str, str] = {}
    for name, own in configs.items():
        if own.hub_model_id and owners.setdefault(own.hub_model_id, name) != name:
            raise UserError(
                f"{owners[own.hub_model_id]} and {name} would both be uploaded to {own.hub_model_id}: leave out "
                f"--hub_model_id, or give each subject its own hub_model_id in {path}"
            )
