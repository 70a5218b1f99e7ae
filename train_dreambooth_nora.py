"""Learn a subject from a few photos: diffusers' train_dreambooth_lora.py flags, NoRA adapters. See docs/training.md."""

from nora_diffusion.programs import run_program
from nora_diffusion.training import main

if __name__ == "__main__":
    run_program(main)
