"""The command ``nora-diffusion``: parses and calls; each subcommand is one module."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .. import __version__
from ..errors import UserError
from ..quiet import hush
from ..training.settings.arguments import with_underscores
from ..training.settings.values import unknown_argument
from . import app, data, demo, evaluate, export, generate, grid, import_, inspect, methods, mix, pack

COMMANDS = {
    "app": app,
    "generate": generate,
    "grid": grid,
    "data": data,
    "evaluate": evaluate,
    "inspect": inspect,
    "methods": methods,
    "mix": mix,
    "export": export,
    "import": import_,
    "pack": pack,
    "demo": demo,
}


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default that its flag's help does not put into words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unsaid = action.default in (None, "", []) or isinstance(action.default, bool)
        return action.help if unsaid or "default" in (action.help or "") else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Raises :class:`UserError` instead of exiting, and suggests the flag that was meant."""

    def __init__(self, **settings: Any) -> None:
        # Half a flag's name is a typo here, as it is for `train`.
        super().__init__(**{"formatter_class": Help, "allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse, with a suggestion for the first unknown flag."""
        values, unknown = self.parse_known_args([with_underscores(word) for word in argv])
        if unknown:
            flags = [flag.lstrip("-") for action in self._flags(values) for flag in action.option_strings]
            raise unknown_argument(unknown, flags, " ".join(filter(None, (self.prog, values.command))))
        return values

    def _flags(self, values: argparse.Namespace) -> list[argparse.Action]:
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and getattr(values, "command", None):
                return list(action.choices[values.command]._actions)
        return self._actions


def check_command(words: Sequence[str]) -> None:
    """Raises :class:`UserError` for a command that there is not."""
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], [*COMMANDS, "train"], 1)
        hint = f"did you mean {near[0]}?" if near else "nora-diffusion --help lists those there are"
        raise UserError(f"there is no command {words[0]!r}: {hint}")


def build_parser() -> Parser:
    """The parser of all commands; ``train`` has its own, made from ``TrainConfig``."""
    parser = Parser(prog="nora-diffusion", description="Learn a subject from a few pictures and generate it.")
    parser.add_argument("--version", action="version", version=f"nora-diffusion {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    commands.add_parser("train", help="learn a subject (nora-diffusion train --help)", add_help=False)
    for name, module in COMMANDS.items():
        sub = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 2 after a user's mistake, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["train"]:
        from ..training import main as train

        return train(words[1:], "nora-diffusion train")
    hush()
    try:
        check_command(words)
        parser = build_parser()
        values = parser.parse(words)
        if values.command is None:
            parser.print_help()
            return 2
        values.run(values)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
