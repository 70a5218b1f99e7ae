"""The app in the browser: ``python app.py``, then open the address that it prints. All flags: ``--help``."""

import sys

from nora_diffusion.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
