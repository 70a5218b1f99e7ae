"""Start the app: ``python app.py``, then open the address that it prints. ``--help`` lists the flags."""

import sys

from nora_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main(["app", *sys.argv[1:]]))
