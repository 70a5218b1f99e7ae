"""The command line of the trainer, generated from the settings of :class:`TrainConfig`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from ...errors import UserError, first_line
from .config import GROUPS, TrainConfig, settings, settings_by_name
from .values import suggestion, unknown_argument


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """One flag a setting, in documented groups. Values stay text: :func:`.values.coerce` reads them."""
    parser = _Parser(
        prog=prog,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Learn a subject from a few photos with a nested low-rank adapter (DreamBooth).",
    )
    parser.add_argument("--config", help="YAML file with the same keys; flags win")
    hints = get_type_hints(TrainConfig)
    groups = {name: parser.add_argument_group(title) for name, title in GROUPS.items()}
    for setting in settings():
        flags = [f"--{name}" for name in (setting.name, *setting.metadata["aliases"])]
        options: dict[str, Any] = {"dest": setting.name, "help": setting.metadata["help"], "metavar": "VALUE"}
        kind = str(setting.type)
        if kind == "bool":
            options |= {"nargs": "?", "const": True, "metavar": "true|false"}
        elif kind.startswith("list"):
            options |= {"nargs": "+"}
        if choices := setting.metadata["choices"] or _choices(hints[setting.name]):
            options["help"] += f"; one of {', '.join(choices)}"
        if setting.default is not None and kind != "bool":
            options["help"] += f" (default: {setting.default})"
        groups[setting.metadata["group"]].add_argument(*flags, **options)
    return parser


def _choices(hint: Any) -> list[str]:
    """The values of a setting that takes one of a few."""
    return [str(value) for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal for value in get_args(kind)]


def parse(argv: Sequence[str] | None, prog: str | None = None) -> TrainConfig:
    """Flags over the YAML file over defaults. Raises :class:`UserError` with an unknown flag's nearest."""
    import sys

    words = [with_underscores(word) for word in (sys.argv[1:] if argv is None else argv)]
    parser = build_parser(prog)
    parsed, unknown = parser.parse_known_args(words)
    if unknown:
        raise unknown_argument(unknown, [*settings_by_name(), "config"], parser.prog)
    values = vars(parsed)
    path = values.pop("config", None)
    return TrainConfig.from_mapping({**(read_yaml(Path(path)) if path else {}), **values})


def with_underscores(word: str) -> str:
    """A flag's name under the spelling that parsers know: ``--a-b`` is ``--a_b``."""
    if not word.startswith("--"):
        return word
    name, mark, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + mark + value


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a YAML file under their main names. Raises :class:`UserError` where it is none."""
    values = _load(path, "config")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold 'key: value' lines, one a setting")
    known = settings_by_name()
    for name in values:
        if name not in known:
            raise UserError(f"unknown setting {name!r} in {path}{suggestion(str(name), known)}")
    return {known[name].name: value for name, value in values.items()}


def read_list(path: Path) -> list[dict[str, Any]]:
    """The entries of a YAML list. Raises :class:`UserError` where it is none."""
    entries = _load(path, "list")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path} must be a list of subjects, each '- key: value' with further keys below")
    return [{str(name): value for name, value in entry.items()} for entry in entries]


def _load(path: Path, what: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {first_line(error)}") from error
