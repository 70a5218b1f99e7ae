"""``python -m nora_diffusion``, and the ``nora-diffusion`` command."""

from typing import NoReturn

from .cli import main
from .programs import run_program


def start() -> NoReturn:
    """Run the command line, and end the process."""
    run_program(main)


if __name__ == "__main__":
    start()
