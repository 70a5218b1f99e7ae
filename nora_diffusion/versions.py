"""Package versions to record in files."""

from __future__ import annotations

from importlib import metadata

from . import __version__

PACKAGES = ("torch", "diffusers", "transformers", "peft")


def versions() -> dict[str, str]:
    """Versions of the packages that determine results.

    This package's is that of the running code; an installed distribution may differ or not exist.
    """
    found = {"nora-diffusion": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found
