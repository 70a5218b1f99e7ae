"""Versions of what an artefact was made with."""

from __future__ import annotations

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
