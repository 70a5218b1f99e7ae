"""Runs :mod:`.command`."""

from ...programs import run_program
from .command import main

if __name__ == "__main__":
    run_program(main)
