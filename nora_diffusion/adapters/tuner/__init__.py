"""The PEFT tuner that carries every method."""
