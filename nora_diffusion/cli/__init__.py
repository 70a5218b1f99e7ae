"""The command ``nora-diffusion``. Each subcommand is a module that parses flags and calls the library."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .. import __version__
from ..errors import UserError
from ..programs import program
from ..quiet import hide_known_warnings
from ..training.settings.arguments import with_underscores
from ..training.settings.values import unknown_argument
from . import (
    basis,
    data,
    demo,
    evaluate,
    export,
    generate,
    grid,
    import_,
    inspect,
    leaderboard,
    methods,
    mix,
    pack,
    sweep,
)
from .servers import app, serve

COMMANDS = {
    "app": app,
    "serve": serve,
    "generate": generate,
    "grid": grid,
    "data": data,
    "evaluate": evaluate,
    "sweep": sweep,
    "leaderboard": leaderboard,
    "inspect": inspect,
    "methods": methods,
    "mix": mix,
    "export": export,
    "import": import_,
    "pack": pack,
    "basis": basis,
    "demo": demo,
}


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of a flag, unless the text has it or it is empty."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        empty = action.default in (None, "", []) or isinstance(action.default, bool)
        return action.help if empty or "default" in (action.help or "") else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Raises :class:`UserError` instead of exiting, and suggests a flag for an unknown one."""

    def __init__(self, **settings: Any) -> None:
        # No abbreviated flags, as in `train`: a typo must not select another flag.
        super().__init__(**{"formatter_class": Help, "allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse the flags. Raises :class:`UserError` with a suggestion for the first unknown one."""
        values, unknown = self.parse_known_args([with_underscores(word) for word in argv])
        if unknown:
            flags = [flag.lstrip("-") for action in self._flags(values) for flag in action.option_strings]
            raise unknown_argument(unknown, flags, " ".join(filter(None, (self.prog, values.command))))
        values.words = [*argv]  # for files that record their command
        return values

    def _flags(self, values: argparse.Namespace) -> list[argparse.Action]:
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and getattr(values, "command", None):
                return list(action.choices[values.command]._actions)
        return self._actions


def check_command(words: Sequence[str]) -> None:
    """Raises :class:`UserError` for an unknown command."""
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], [*COMMANDS, "train", "federate"], 1)
        hint = f"did you mean {near[0]}?" if near else "nora-diffusion --help lists all commands"
        raise UserError(f"there is no command {words[0]!r}: {hint}")


def build_parser() -> Parser:
    """The parser of all commands except ``train`` and ``federate``, whose parsers are made from ``TrainConfig``."""
    parser = Parser(
        prog="nora-diffusion", description="Train an adapter on a few photos of a subject, and generate images of it."
    )
    parser.add_argument("--version", action="version", version=f"nora-diffusion {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    commands.add_parser("train", help="train an adapter (nora-diffusion train --help)", add_help=False)
    commands.add_parser("federate", help="train with photos that stay with several clients", add_help=False)
    for name, module in COMMANDS.items():
        sub = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or that of :func:`nora_diffusion.programs.program` after an error."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["train"]:
        from ..training import main as train

        return train(words[1:], "nora-diffusion train")
    if words[:1] == ["federate"]:
        from ..training.federated.command import main as federate

        return federate(words[1:], "nora-diffusion federate")
    hide_known_warnings()
    check_command(words)
    parser = build_parser()
    values = parser.parse(words)
    if values.command is None:
        parser.print_help()
        return 2
    values.run(values)
    return 0
