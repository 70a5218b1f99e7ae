"""Constraints for pip with the lowest release of every range in pyproject.toml: ``python -m tests.lowest [--torch]``.

The ranges are those of the package and of the extras in ``EXTRAS``. The tools of ``dev`` are pinned as in
constraints.txt, and so is torch without ``--torch``: PyPI has its older releases for Linux with CUDA only.
"""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
EXTRAS = ("app", "serve", "train", "track", "quantize")


def project() -> dict[str, list[Requirement]]:
    """The requirements of pyproject.toml by extra; those of the package itself under ``""``."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"": table["dependencies"], **table["optional-dependencies"]}
    return {name: [Requirement(line) for line in lines] for name, lines in groups.items()}


def lowest(requirement: Requirement) -> str:
    """The release after ``>=``, as a constraint. Raises ``StopIteration`` if the range has no lower end."""
    return f"{requirement.name}=={next(part.version for part in requirement.specifier if part.operator == '>=')}"


def pinned(names: set[str]) -> list[str]:
    """The lines of constraints.txt about these packages, which it names in canonical form."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.split("==")[0] in {canonicalize_name(name) for name in names}]


def constraints(torch: bool) -> list[str]:
    """The lines for pip; ``torch``: with torch's lowest release instead of the pinned one."""
    groups = project()
    ranges = [requirement for extra in ("", *EXTRAS) for requirement in groups[extra]]
    tools = {requirement.name for requirement in groups["dev"]}
    return [
        *(lowest(requirement) for requirement in ranges if torch or requirement.name != "torch"),
        *pinned(tools if torch else tools | {"torch"}),
    ]


if __name__ == "__main__":
    print("\n".join(constraints("--torch" in sys.argv)))
