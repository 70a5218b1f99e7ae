"""Start the app: ``python app.py``, then open the address that it prints. ``--help`` lists the flags."""

import sys

from nora_diffusion.cli import main
from nora_diffusion.programs import run_program

if __name__ == "__main__":
    run_program(main, ["app", *sys.argv[1:]])
