"""The PEFT tuner that carries every method. Importing it registers the tuner with PEFT."""

from .register import register

register()
