"""Command-line parser of the trainer, generated from :class:`TrainConfig`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from ...errors import UserError
from ...io.yaml_text import read_yaml
from .config import GROUPS, TrainConfig, settings, settings_by_name
from .values import suggestion, unknown_argument


class Parser(argparse.ArgumentParser):
    """Raises :class:`UserError` instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Parser with one flag per setting. Values stay strings; :func:`.values.coerce` converts them."""
    parser = Parser(
        prog=prog,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Train a DreamBooth adapter (NoRA, LoRA and relatives) on a few photos of a subject.",
    )
    parser.add_argument("--config", help="YAML file with the same keys; flags override it")
    hints = get_type_hints(TrainConfig)
    groups = {name: parser.add_argument_group(title) for name, title in GROUPS.items()}
    for setting in settings():
        flags = [f"--{name}" for name in (setting.name, *setting.metadata["aliases"])]
        options: dict[str, Any] = {"dest": setting.name, "help": setting.metadata["help"], "metavar": "VALUE"}
        annotation = str(setting.type)
        if annotation == "bool":
            options |= {"nargs": "?", "const": True, "metavar": "true|false"}
        elif annotation.startswith("list"):
            options |= {"nargs": "+"}
        if choices := setting.metadata["choices"] or _choices(hints[setting.name]):
            options["help"] += f"; one of {', '.join(choices)}"
        if setting.default is not None and annotation != "bool":
            options["help"] += f" (default: {setting.default})"
        groups[setting.metadata["group"]].add_argument(*flags, **options)
    return parser


def _choices(hint: Any) -> list[str]:
    """Values of the ``Literal`` in a type hint, if it has one."""
    return [
        str(value) for option in (hint, *get_args(hint)) if get_origin(option) is Literal for value in get_args(option)
    ]


def parse(argv: Sequence[str] | None, prog: str | None = None) -> TrainConfig:
    """Parse the command line; flags override the YAML file. Raises :class:`UserError` that suggests similar flags."""
    import sys

    arguments = [with_underscores(word) for word in (sys.argv[1:] if argv is None else argv)]
    parser = build_parser(prog)
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise unknown_argument(unknown, [*settings_by_name(), "config"], parser.prog)
    values = vars(parsed)
    path = values.pop("config", None)
    return TrainConfig.from_mapping({**(read_settings(Path(path)) if path else {}), **values})


def with_underscores(word: str) -> str:
    """Accept dashes in flag names: ``--a-b=c`` becomes ``--a_b=c``."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def read_settings(path: Path) -> dict[str, Any]:
    """Settings of a YAML file, by name. Raises :class:`UserError` for unknown or repeated keys and invalid files."""
    return by_name(read_yaml(path, "config"), str(path))


def by_name(values: Any, source: str) -> dict[str, Any]:
    """The settings of a YAML document by name, with aliases resolved. Raises :class:`UserError`."""
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{source} must contain 'key: value' lines, one per setting")
    known = settings_by_name()
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"unknown setting {key!r} in {source}{suggestion(str(key), known)}")
        name = known[key].name
        if name in found:
            raise UserError(f"{source} has {name} under two names: keep one of them")
        found[name] = value
    return found
