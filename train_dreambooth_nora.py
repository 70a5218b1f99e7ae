"""Learn a subject from a few photos: diffusers' train_dreambooth_lora.py flags, NoRA adapters. See docs/training.md."""

import sys

from nora_diffusion.training import main

if __name__ == "__main__":
    sys.exit(main())
