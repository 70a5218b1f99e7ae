"""Reads the YAML file of a sweep: which trainings it consists of."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...io.yaml_text import read_yaml
from ..settings.config import settings_by_name
from ..settings.values import suggestion

MAX_CELLS = 10_000
KEYS = ("settings", "axes")
RESERVED = (
    "subjects", "joint", "engine", "address", "output_dir", "overwrite_output_dir", "resume_from_checkpoint",
    "preflight_only", "subjects_per_task",
)  # fmt: skip
"""Settings that the sweep itself decides."""


@dataclass(frozen=True)
class Cell:
    """One training: its folder's name, its label on each axis, and its settings as text."""

    name: str
    labels: Mapping[str, str]
    settings: Mapping[str, Any]


def read_cells(path: Path) -> list[Cell]:
    """The cells of a sweep, the product of its axes; the last axis varies fastest. Raises :class:`UserError`.

    ``settings`` are those of every cell. An axis is a setting with the list of its values, or a name of its own with
    the settings that each label stands for.
    """
    document = read_yaml(path, "sweep")
    if not isinstance(document, dict) or not isinstance(document.get("axes"), dict) or not document["axes"]:
        raise UserError(f"{path} has no axes: write 'axes:' and below it for example 'learning_rate: [5e-4, 1e-3]'")
    if unknown := [str(key) for key in document if key not in KEYS]:
        raise UserError(f"{path}: unknown key {unknown[0]!r}{suggestion(unknown[0], KEYS)}")
    common = _settings(document.get("settings") or {}, f"{path}, settings")
    axes = {str(name): _axis(str(name), values, path) for name, values in document["axes"].items()}
    _check_overlap(axes, path)
    if (count := math.prod(map(len, axes.values()))) > MAX_CELLS:
        raise UserError(f"{path} has {count} cells, but at most {MAX_CELLS} are possible: remove some values")
    cells = [_cell(common, axes, labels) for labels in product(*axes.values())]
    _check_names(cells, path)
    return cells


def _axis(name: str, values: Any, path: Path) -> dict[str, dict[str, Any]]:
    """The settings of each label."""
    where = f"{path}, axis {name!r}"
    if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
        labels = {value: _settings({name: value}, where) for value in values}
    elif isinstance(values, dict) and values and all(isinstance(changes, dict) for changes in values.values()):
        labels = {str(label): _settings(changes, f"{where}, {label!r}") for label, changes in values.items()}
    else:
        raise UserError(
            f"{where}: give a list of values, or labels with the settings of each ('label: {{key: value}}')"
        )
    if len(labels) < len(values):
        raise UserError(f"{where}: a value occurs twice")
    return labels


def _settings(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UserError(f"{where}: give settings as 'key: value'")
    known = settings_by_name()
    for key in map(str, values):
        if key not in known:
            raise UserError(f"{where}: unknown setting {key!r}{suggestion(key, known)}")
        if known[key].name in RESERVED:
            raise UserError(f"{where}: {key} cannot be set in a sweep, which decides it itself")
    return {known[str(key)].name: value for key, value in values.items()}


def _check_overlap(axes: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    owners: dict[str, str] = {}
    for name, labels in axes.items():
        for key in {key for changes in labels.values() for key in changes}:
            if owners.setdefault(key, name) != name:
                raise UserError(f"{path}: the axes {owners[key]!r} and {name!r} both set {key}: keep one of them")


def _cell(common: Mapping[str, Any], axes: Mapping[str, Mapping[str, Any]], labels: tuple[str, ...]) -> Cell:
    by_axis = dict(zip(axes, labels, strict=True))
    settings = dict(common)
    for axis, label in by_axis.items():
        settings |= axes[axis][label]
    return Cell("_".join(re.sub(r"[^\w.-]+", "-", label) for label in labels), by_axis, settings)


def _check_names(cells: list[Cell], path: Path) -> None:
    owners: dict[str, Cell] = {}
    for cell in cells:
        if not re.fullmatch(r"\w[\w.-]{0,199}", cell.name):
            raise UserError(
                f"{path}: {cell.name!r} is not a folder name: give its values short labels ('label: {{...}}')"
            )
        other = owners.setdefault(cell.name.casefold(), cell)
        if other is not cell:
            raise UserError(
                f"{path}: the cells {dict(other.labels)} and {dict(cell.labels)} would share the folder "
                f"{cell.name!r}: give their values other labels"
            )
