"""The releases of other libraries that this package works with, and package versions to record in files."""

from __future__ import annotations

from importlib import metadata

from packaging.specifiers import SpecifierSet

REQUIRED = {
    "torch": ">=2.10",
    "diffusers": ">=0.41,<0.44",
    "transformers": ">=5.10.4,<6",
    "accelerate": ">=1.10",
    "peft": ">=0.21,<0.23",
    "safetensors": ">=0.8",
    "huggingface_hub": ">=1.32",
    "Pillow": ">=11.1",
    "numpy": ">=2.0",
}
"""The ranges of ``pyproject.toml``. ``make test-lowest`` runs the tests with the lowest release of each."""
PACKAGES = ("torch", "diffusers", "transformers", "peft")


def check_installed(required: dict[str, str] = REQUIRED) -> None:
    """Raise ``ImportError`` if an installed library is outside its range.

    Other releases may seem to work and do not: transformers before 5.6 gives the embedded base a text encoder of
    random weights and only logs it. A library without package metadata (a source tree on the path) is not checked.
    """
    wrong = []
    for name, versions in required.items():
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if not SpecifierSet(versions).contains(installed, prereleases=True):
            wrong.append((name, versions, installed))
    if wrong:
        found = ", ".join(f"{name} {installed}" for name, _, installed in wrong)
        wanted = " ".join(f'"{name}{versions}"' for name, versions, _ in wrong)
        raise ImportError(f"nora_diffusion does not work with {found}: run pip install {wanted}")


def versions() -> dict[str, str]:
    """Versions of the packages that determine results.

    This package's is that of the running code; an installed distribution may differ or not exist.
    """
    from . import __version__

    found = {"nora-diffusion": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found
