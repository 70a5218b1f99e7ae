"""``python -m nora_diffusion``."""

import sys

from .cli import main

sys.exit(main())
