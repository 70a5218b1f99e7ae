"""Releases of other libraries: the ranges, their check at import, and the constraints of ``make test-lowest``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from nora_diffusion.versions import REQUIRED, check_installed
from tests.lowest import constraints, project

ROOT = Path(__file__).parents[1]
NOT_CHECKED = {"packaging", "pillow-heif", "pyyaml", "tqdm"}
"""Dependencies of a few stable calls each."""


def test_the_checked_ranges_are_those_of_pyproject() -> None:
    ranges = {requirement.name: requirement.specifier for requirement in project()[""]}
    assert {name: ranges[name] for name in REQUIRED} == {name: SpecifierSet(text) for name, text in REQUIRED.items()}
    assert set(ranges) - set(REQUIRED) == NOT_CHECKED


def test_the_installed_releases_are_inside_the_ranges() -> None:
    check_installed()


@pytest.mark.parametrize(
    ("name", "versions", "fits"),
    [
        ("pytest", ">=1", True),
        ("pytest", ">=1000", False),
        ("pytest", "<1", False),
        ("pytest", ">=1,<1000", True),
        ("no-such-library", ">=1", True),  # without metadata there is nothing to compare
    ],
)
def test_a_release_outside_its_range_is_refused(name: str, versions: str, fits: bool) -> None:
    if fits:
        check_installed({name: versions})
    else:
        with pytest.raises(ImportError, match=f'{name} .*: run pip install "{name}{versions}"'):
            check_installed({name: versions})


@pytest.mark.parametrize(("name", "version"), [("transformers", "5.9.0"), ("diffusers", "0.40.0"), ("peft", "0.23.0")])
def test_the_package_does_not_import_with_it(tmp_path: Path, name: str, version: str) -> None:
    folder = tmp_path / f"{name}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", "import nora_diffusion"], env={**os.environ, "PYTHONPATH": path}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f'ImportError: nora_diffusion does not work with {name} {version}: run pip install "{name}{REQUIRED[name]}"'
    )


def test_the_lowest_releases_are_constraints_for_pip() -> None:
    without, with_torch = constraints(torch=False), constraints(torch=True)
    assert "transformers==5.10.4" in without
    assert "gradio==6.31" in without
    assert "torch==2.10" in with_torch
    assert [line for line in without if line.startswith("torch==")] == [
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")
    ]
    names = {requirement.name for requirement in project()[""]}
    assert names <= {line.split("==")[0] for line in without}
