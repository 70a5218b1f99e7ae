"""The list of subjects: ``--subjects subjects.yaml``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import UserError
from .arguments import read_list
from .checks import check_config
from .config import TrainConfig, settings_by_name, tagged


def read_subjects(config: TrainConfig) -> dict[str, TrainConfig]:
    """A config for each entry of the list, by the subject's name.

    An entry holds settings of :class:`TrainConfig`, which win over those of ``config``, and ``name``: that of its
    folder (default: the name of ``instance_data_dir``). Raises :class:`UserError` for a setting that all must share,
    or a name that is no folder's or is given twice, or two uploads to one repository.
    """
    found: dict[str, TrainConfig] = {}
    own = ("name", *tagged("own"))
    path = Path(config.subjects or "").expanduser()
    for number, values in enumerate(read_list(path), start=1):
        name = str(values.pop("name", "") or Path(str(values.get("instance_data_dir", ""))).name)
        place = f"subject {number} of {path}"
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f"{place}: {name!r} names no folder: give it a 'name' of letters, digits, '-' and '_'")
        if name.casefold() in {known.casefold() for known in found}:
            raise UserError(f"{place}: {name!r} is there already: give each subject a 'name' of its own")
        shared = [key for key in values if (key not in own if config.joint else key in tagged("shared"))]
        if shared:
            raise UserError(f"{place}: {shared[0]} is the same for all subjects: give it as a flag, --{shared[0]}")
        try:
            entry = TrainConfig.from_mapping(values)
            given = {settings_by_name()[key].name for key in values}
            changes = {key: getattr(entry, key) for key in given}
            single: dict[str, Any] = {"subjects": None, "joint": False, "engine": "local", "address": None}
            found[name] = replace(config, **changes, **single, output_dir=str(config.folder / name))
            check_config(found[name])
        except UserError as error:
            raise UserError(f"{place} ({name}): {error}") from error
    if not config.joint:
        _check_uploads(path, found)
    return found


def _check_uploads(path: Path, found: Mapping[str, TrainConfig]) -> None:
    """Raise :class:`UserError` for a repository that two subjects would overwrite each other in."""
    owners: dict[str, str] = {}
    for name, own in found.items():
        if own.hub_model_id and owners.setdefault(own.hub_model_id, name) != name:
            raise UserError(
                f"{owners[own.hub_model_id]} and {name} would both be uploaded to {own.hub_model_id}: leave "
                f"--hub_model_id out, or give each subject its own hub_model_id in {path}"
            )
