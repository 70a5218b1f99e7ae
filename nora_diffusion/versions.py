"""Versions of what an artifact was made with."""

from __future__ import annotations

from importlib import metadata

from . import __version__

PACKAGES = ("torch", "diffusers", "transformers", "peft")


def versions() -> dict[str, str]:
    """Versions of the packages that shape the numbers.

    This package's is that of the code that runs: an installed one may be another, or none beside a source tree.
    """
    found = {"nora-diffusion": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found
