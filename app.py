"""The app in the browser: ``python app.py``, then open the address that it prints. All flags: ``--help``."""

import sys

from nora_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main(["app", *sys.argv[1:]]))
