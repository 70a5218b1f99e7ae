"""Versions of what an artefact was made with, and what other packages say of theirs."""

from __future__ import annotations

import logging
from importlib import metadata

PACKAGES = ("nora-diffusion", "torch", "diffusers", "transformers", "peft")


def versions() -> dict[str, str]:
    """Installed versions of the packages that shape the numbers."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def hush() -> None:
    """Have nothing said of torchao, which transformers and diffusers look at wherever it is installed.

    Before torch is imported, and in commands only: a program that uses this package has its own log.
    """
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
